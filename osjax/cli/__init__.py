"""The command line. It and `configs` are the only places that know ConfigDict."""
