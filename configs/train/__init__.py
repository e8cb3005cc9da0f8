"""Named configurations of `osjax train`: each file has a `get_config()` that returns a ConfigDict."""
