"""The typed configuration: one model per area, loaded from a recipe, a YAML file and overrides.

This package imports neither torch nor diffusers, so that ``--help`` and errors are instant.
"""

from gardo.config.algorithm import AlgorithmConfig, NFTConfig, ReferenceConfig
from gardo.config.fields import on_resume
from gardo.config.generators import GENERATORS
from gardo.config.loading import (
    RECIPES,
    iter_keys,
    load_config,
    recipe_description,
    recipe_names,
    to_yaml,
    type_name,
    validate,
)
from gardo.config.schema import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    HealthConfig,
    ModelConfig,
    PromptsConfig,
    RewardsConfig,
    SamplingConfig,
    TrainConfig,
)
from gardo.config.traits import TRAITS, Traits

__all__ = [
    "GENERATORS",
    "RECIPES",
    "TRAITS",
    "AlgorithmConfig",
    "CheckpointConfig",
    "Config",
    "EvaluationConfig",
    "HealthConfig",
    "ModelConfig",
    "NFTConfig",
    "PromptsConfig",
    "ReferenceConfig",
    "RewardsConfig",
    "SamplingConfig",
    "TrainConfig",
    "Traits",
    "iter_keys",
    "load_config",
    "on_resume",
    "recipe_description",
    "recipe_names",
    "to_yaml",
    "type_name",
    "validate",
]
