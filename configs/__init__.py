"""Training configurations: each module defines get_config(arg: str = "") -> ConfigDict."""
