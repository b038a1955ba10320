"""What the descriptors say of the families, against diffusers and against what a model does."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import diffusers
import pytest
import torch

import gardo
from gardo.config import load_config
from gardo.families import FAMILIES
from gardo.models.architectures import read_architecture
from gardo.models.embeddings import EMPTY, EmbeddingTable
from gardo.models.loading import load_model
from gardo.types import UserError
from tests.support.tiny import PROMPTS, save_pipeline

SIDE, T5_LENGTH = 24, 12


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    path = tmp_path_factory.mktemp(family.name)
    save_pipeline(family.name, path)
    return path


@pytest.fixture(scope="module")
def model(family, folder):
    overrides = [("model.path", str(folder)), ("model.max_sequence_length", str(T5_LENGTH))]
    config = load_config("tiny", overrides=overrides)
    return load_model(config.model, torch.device("cpu"), "fp32")


def test_the_classes_are_those_of_the_pipeline(family, model):
    assert model.family == family.name
    assert f"{type(model).__module__}:{type(model).__name__}" == family.model
    assert type(model.pipeline).__name__ == family.pipeline
    assert type(model.transformer).__name__ == family.transformer
    known = inspect.signature(getattr(diffusers, family.pipeline).__init__).parameters
    encoders = [n for n in known if n.startswith("text_encoder")]
    assert [*family.text_encoders] == encoders


def test_blocks_and_lora_targets_are_in_the_transformer(family, model):
    modules = dict(model.transformer.named_modules())
    for target in family.lora_targets:
        assert any(name.endswith(f".{target}") for name in modules), target
    # everything that is repeated is a block
    lists = {n for n, m in modules.items() if type(m) is torch.nn.ModuleList and "." not in n}
    assert lists == set(family.blocks)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_the_inputs_are_those_that_the_model_gives_its_transformer(
    family, folder, model, guidance_scale
):
    embeddings = EmbeddingTable(model, PROMPTS)
    cond, uncond = embeddings(PROMPTS), embeddings([EMPTY] * len(PROMPTS))
    given = {}

    def note(module, args, kwargs):
        assert not args
        given.update({n: v for n, v in kwargs.items() if torch.is_tensor(v)})

    hook = model.transformer.register_forward_pre_hook(note, with_kwargs=True)
    guided = family.guided(guidance_scale)
    latents = torch.randn(len(PROMPTS), *model.latent_shape(SIDE))
    with torch.no_grad():
        model.velocity(
            latents,
            torch.full((len(PROMPTS),), 500.0),
            cond,
            uncond if guided else None,
            guidance_scale,
        )
    hook.remove()
    rows = len(PROMPTS) * (2 if guided else 1)
    arch = read_architecture(folder, "some")
    assert arch.family == family.name
    expected = arch.inputs(rows, SIDE, T5_LENGTH)
    assert {n: tuple(v.shape) for n, v in given.items()} == expected
    one = {n: tuple(t.shape[1:]) for n, t in cond.tensors.items()}
    assert one == arch.prompt_shapes(T5_LENGTH)


def test_guidance_takes_rows_where_it_is_classifier_free():
    assert FAMILIES["sd3"].guided(1.5)
    assert not FAMILIES["sd3"].guided(1.0)
    assert not FAMILIES["flux"].guided(3.5)


def test_a_configuration_takes_the_families_and_no_other(family):
    assert load_config("tiny", overrides=[("model.family", family.name)]).model.family
    with pytest.raises(UserError, match="model.family: expected 'auto', 'sd3' or 'flux', got 'x'"):
        load_config("tiny", overrides=[("model.family", "x")])


def test_a_family_is_named_in_its_file_and_its_descriptor_alone(family):
    """So that adding one takes these two and a recipe."""
    package = Path(gardo.__file__).parent
    named = re.compile(rf"""["']({family.name}|{family.pipeline}|{family.transformer})["']""")
    found = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if named.search(file.read_text(encoding="utf-8"))
    }
    assert found == {"families.py", f"models/{family.name}.py"}
