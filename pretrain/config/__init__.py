"""The run's configuration: YAML in, frozen and validated sections out."""

from pretrain.config.errors import ConfigError
from pretrain.config.schema import Config, identity_hash
from pretrain.config.validate import load_config, parse_config, parse_stored_config

__all__ = ["Config", "ConfigError", "identity_hash", "load_config", "parse_config", "parse_stored_config"]
