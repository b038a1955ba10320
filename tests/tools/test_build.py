"""The build command runs end to end, and its parts do what they say."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from gardo.tiny.scenes import MAX_COUNT, all_scenes
from gardo.types import UserError
from tools.tiny import build, pretrain
from tools.tiny.models import build_sd3_pipeline, save_pipeline, zero_initialize
from tools.tiny.muon import Muon, orthogonalize


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_quick_build_makes_a_loadable_pipeline(tmp_path, capsys):
    assert build.main(["--quick", "--threads", "1", "--out", str(tmp_path / "model")]) == 0
    table = (tmp_path / "model" / "QUALITY.md").read_text()
    assert table in capsys.readouterr().out
    assert "python -m tools.tiny.build --seed 0 --steps 10" in table
    quality = json.loads((tmp_path / "model" / "quality.json").read_text())
    for record in quality["records"]:
        assert list(record["accuracy"]) == [str(n) for n in range(1, MAX_COUNT + 1)]
        assert all(0 <= value <= 1 for value in record["accuracy"].values())
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    assert pipe.vae.config.scaling_factor != 1.0
    assert pipe("one red circle", num_inference_steps=1).images[0].size == (24, 24)


@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--threads", "-1"], ["--seed", "x"], ["--nonsense"]]
)
def test_wrong_options_are_user_errors(arguments):
    with pytest.raises(UserError, match=arguments[0]):
        build.main(arguments)


def test_output_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out: expected a folder"):
        build.main(["--out", str(tmp_path / "file")])


def test_quick_never_overwrites_the_shipped_model():
    with pytest.raises(UserError, match="--quick: expected another --out"):
        build.main(["--quick"])


def test_package_and_help_import_no_torch():
    script = (
        "import sys, gardo.tiny, tools.tiny.build\n"
        "try:\n    tools.tiny.build.main(['--help'])\nexcept SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "assert 'torch' not in sys.modules\n"
        "assert gardo.tiny.pipeline_path().name == 'pipeline'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, capture_output=True)


@pytest.mark.parametrize("shape", [(12, 12), (30, 7), (7, 30)])
def test_orthogonalize_finds_the_polar_factor(shape):
    matrices = torch.randn(3, *shape, generator=_generator())
    result = orthogonalize(matrices)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    # in the singular basis the result is diagonal: the quintic maps singular values to 0.68..1.14
    # once they are above about 0.01 of the norm
    basis = u.mT @ result @ vh.mT
    diagonal = basis.diagonal(dim1=1, dim2=2)
    assert (basis - torch.diag_embed(diagonal)).abs().max() < 1e-3
    assert diagonal.max() < 1.25
    assert diagonal.median() > 0.6
    assert orthogonalize(torch.zeros(1, 3, 4)).eq(0).all()


def test_muon_step_has_the_stated_size_and_direction():
    weight = torch.nn.Parameter(torch.zeros(32, 8))
    gradient = torch.randn(32, 8, generator=_generator())
    weight.grad = gradient.clone()
    Muon([weight], lr=0.1).step()
    # 0.1 * sqrt(32 / 8) times a matrix with singular values of about 1
    singular = torch.linalg.svdvals(weight.detach())
    assert singular.min() > 0.2 * 0.6
    assert singular.max() < 0.2 * 1.25
    assert (weight.detach() * gradient).sum() < 0


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match="expected matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_zero_initialisation_makes_the_output_zero():
    transformer = build_sd3_pipeline(0).transformer
    inputs = {
        "hidden_states": torch.randn(2, 4, 12, 12, generator=_generator()),
        "encoder_hidden_states": torch.randn(2, 5, 64, generator=_generator()),
        "pooled_projections": torch.randn(2, 64, generator=_generator()),
        "timestep": torch.tensor([10.0, 900.0]),
    }
    with torch.no_grad():
        assert transformer(**inputs).sample.abs().max() > 0
        zero_initialize(transformer)
        assert transformer(**inputs).sample.abs().max() == 0
    for block in transformer.transformer_blocks:
        assert block.norm1.linear.weight.abs().max() == 0
        assert block.norm1_context.linear.weight.abs().max() == 0
        assert block.attn.to_q.weight.abs().max() > 0


def test_save_leaves_the_pipeline_in_float32(tmp_path):
    pipe = build_sd3_pipeline(0)
    save_pipeline(pipe, tmp_path)
    assert pipe.transformer.dtype == torch.float32
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path, local_files_only=True)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_3"):
        saved, own = getattr(again, name).state_dict(), getattr(pipe, name).state_dict()
        assert all(torch.equal(saved[key], own[key].half().float()) for key in own), name


def test_prompt_table_matches_the_pipelines_encoding():
    pipe = build_sd3_pipeline(0)
    scenes = all_scenes()
    table = pretrain.encode_prompts(pipe, scenes)
    assert len(table.pooled) == len(scenes) * (1 + len(pretrain.TEMPLATES)) + 1
    for row, prompt in ((3, scenes[3].prompt), (len(table.pooled) - 1, "")):
        context, _, pooled, _ = pipe.encode_prompt(
            prompt,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=pretrain.T5_ENCODED,
        )
        # batches of other sizes may round differently
        torch.testing.assert_close(table.context[row], context[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(table.pooled[row], pooled[0], rtol=1e-5, atol=1e-5)


def test_prompt_draws_keep_their_shares():
    rows, scenes = 1 + len(pretrain.TEMPLATES), 40
    marks = torch.arange(rows * scenes + 1.0)[:, None]
    table = pretrain.PromptTable(marks[:, None].repeat(1, 20, 1), marks, scenes)
    scene = torch.full((4000,), 7)
    generator = _generator()
    context, pooled = table.draw(scene, generator)
    drawn = pooled[:, 0].long()
    empty = drawn == rows * scenes
    # shares of 4000 draws: standard error below 0.005, five of them are allowed
    assert abs(empty.float().mean().item() - pretrain.UNCONDITIONAL_SHARE) < 0.025
    assert (drawn[~empty] % scenes == 7).all()
    plain = (drawn[~empty] == 7).float().mean().item()
    assert abs(plain - (1 - pretrain.TEMPLATE_SHARE)) < 0.025
    lengths = {table.draw(scene[:1], generator)[0].shape[1] for _ in range(200)}
    base = context.shape[1]
    assert base in lengths
    assert lengths <= {20 + length - pretrain.T5_ENCODED for length in pretrain.T5_LENGTHS}
    assert len(lengths) > 1


def test_autoencoder_training_reduces_the_error_and_sets_the_factors():
    pipe = build_sd3_pipeline(0)
    early = pretrain.train_autoencoder(pipe.vae, _generator(), steps=2, batch_size=8)
    later = pretrain.train_autoencoder(pipe.vae, _generator(1), steps=60, batch_size=8)
    assert later < 0.7 * early
    latents, scene = pretrain.encode_scenes(pipe.vae, 64, _generator())
    assert latents.shape == (64, 4, 12, 12)
    assert scene.shape == (64,)
    assert abs(latents.mean().item()) < 0.2
    assert 0.8 < latents.std().item() < 1.2


def test_transformer_training_is_seeded_and_learns():
    latents = torch.randn(8, 4, 12, 12, generator=_generator())
    scene = torch.arange(8)

    def train(seed, steps):
        pipe = build_sd3_pipeline(0, num_layers=1, num_heads=2)
        settings = pretrain.FlowSettings(steps=steps, batch_size=4)
        return pretrain.train_transformer(pipe, latents, scene, _generator(seed), settings)

    first, again, other = train(0, 3), train(0, 3), train(1, 3)
    key = "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(first.state_dict()[key], again.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])
    assert first.proj_out.weight.abs().max() > 0
    assert not first.training
