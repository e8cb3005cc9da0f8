"""Named configurations of `osjax generate`: each file has a `get_config()` that returns a ConfigDict."""
