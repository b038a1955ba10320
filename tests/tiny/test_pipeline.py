"""The shipped pipeline is complete, small, plain diffusers, trained and deterministic."""

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open

from gardo.tiny import pipeline_path
from gardo.tiny.components import exact_count
from gardo.tiny.scenes import COLORS, IMAGE_SIZE, all_scenes, render
from tools.tiny.models import build_flux_pipeline, build_sd3_pipeline, pipeline_modules
from tools.tiny.quality import SamplerSetting, accuracy_by_count, sample_images
from tools.tiny.vocabulary import FILLERS, MAX_TOKENS, WORDS, clip_tokenizer, t5_tokenizer

WEIGHTS = sorted(pipeline_path().rglob("*.safetensors"))


@pytest.fixture(scope="module")
def pipeline():
    loaded = StableDiffusion3Pipeline.from_pretrained(pipeline_path(), local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _sample(pipe, prompt, **changes):
    options = {"num_inference_steps": 6, "guidance_scale": 1.5, "max_sequence_length": 16}
    options.update(changes)
    return pipe(prompt, generator=_generator(), output_type="pt", **options).images


def test_folder_is_small_and_half_precision():
    size = sum(file.stat().st_size for file in pipeline_path().rglob("*") if file.is_file())
    assert size < 8e6
    assert {file.parent.name for file in WEIGHTS} == {
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    }
    for file in WEIGHTS:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                assert tensors.get_slice(name).get_dtype() == "F16", f"{file.name}: {name}"


def test_folder_holds_no_pickles():
    suffixes = {file.suffix for file in pipeline_path().rglob("*") if file.is_file()}
    assert suffixes <= {".json", ".safetensors", ".md", ".txt"}


def test_classes_are_those_of_stable_diffusion_3(pipeline):
    names = {name: type(part).__name__ for name, part in pipeline.components.items()}
    assert names["transformer"] == "SD3Transformer2DModel"
    assert names["vae"] == "AutoencoderKL"
    assert names["text_encoder"] == names["text_encoder_2"] == "CLIPTextModelWithProjection"
    assert names["text_encoder_3"] == "T5EncoderModel"
    assert names["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert pipeline.scheduler.config.shift == 3.0
    parameters = sum(p.numel() for p in pipeline.transformer.parameters())
    assert 2.0e6 < parameters < 2.5e6
    for name, module in pipeline_modules(pipeline).items():
        assert module.dtype == torch.float32, name
        assert not any(part.training for part in module.modules()), name


def test_loads_offline_without_this_package(tmp_path):
    script = (
        "import sys, torch\n"
        "from diffusers import StableDiffusion3Pipeline\n"
        "pipe = StableDiffusion3Pipeline.from_pretrained(\n"
        "    sys.argv[1], local_files_only=True, torch_dtype=torch.float32)\n"
        "image = pipe('two red circles', num_inference_steps=2, max_sequence_length=16).images[0]\n"
        "assert image.size == (24, 24), image.size\n"
        "assert not any(name.split('.')[0] == 'gardo' for name in sys.modules)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", script, str(pipeline_path())],
        cwd=tmp_path,
        env=environment,
        check=True,
        timeout=120,
    )


def test_reload_gives_identical_images(pipeline):
    again = StableDiffusion3Pipeline.from_pretrained(pipeline_path(), local_files_only=True)
    again.set_progress_bar_config(disable=True)
    first = _sample(pipeline, "three red circles")
    assert first.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(first, _sample(again, "three red circles"))


@pytest.mark.parametrize("make", [clip_tokenizer, t5_tokenizer])
def test_every_word_is_one_token_of_its_own(make):
    tokenizer = make()
    words = [*WORDS, *FILLERS]
    ids = [tuple(tokenizer(word, add_special_tokens=False).input_ids) for word in words]
    assert all(len(tokens) == 1 for tokens in ids)
    assert len(set(ids)) == len(words)
    assert tokenizer("Three RED circles" if make is clip_tokenizer else "three red circles") == (
        tokenizer("three red circles")
    )


def test_saved_tokenizers_equal_the_built_ones(pipeline):
    for scene in all_scenes(range(1, 10)):
        for saved, built in (
            (pipeline.tokenizer, clip_tokenizer()),
            (pipeline.tokenizer_2, clip_tokenizer()),
            (pipeline.tokenizer_3, t5_tokenizer()),
        ):
            ids = saved(scene.prompt).input_ids
            assert ids == built(scene.prompt).input_ids
            assert len(ids) <= MAX_TOKENS


def test_unknown_words_and_the_empty_prompt_are_accepted(pipeline):
    images = _sample(pipeline, ["", "two purple elephants, 7 of them!", "x" * 100])
    assert images.isfinite().all()


def test_text_encoding_does_not_depend_on_the_padded_length(pipeline):
    def encode(length):
        context, _, pooled, _ = pipeline.encode_prompt(
            ["five blue squares", "one red circle"],
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
        )
        return context, pooled

    short, pooled = encode(8)
    long, pooled_long = encode(256)
    assert torch.equal(pooled, pooled_long)
    # matrix products of other shapes round differently: float32 rounding only
    torch.testing.assert_close(long[:, : short.shape[1]], short, rtol=1e-5, atol=1e-5)
    assert long[:, short.shape[1] :].eq(0).all()


def test_images_hardly_depend_on_the_padded_length(pipeline):
    prompts = ["four yellow circles", "two green squares"]
    short, long = (
        sample_images(pipeline, prompts, SamplerSetting(6, 1.5, t5_length=length), _generator())
        for length in (8, 256)
    )
    # one average shape (22 px) more or less in one of the two images would make about 0.006
    assert (short - long).abs().mean() < 0.003


def test_autoencoder_keeps_counts_and_scales_latents(pipeline):
    scenes = all_scenes(range(1, 10)) * 2
    images = render(scenes, _generator(7))
    vae = pipeline.vae
    with torch.no_grad():
        latents = vae.encode(2 * images - 1).latent_dist.mean
        scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        decoded = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    assert abs(scaled.mean().item()) < 0.1
    assert 0.8 < scaled.std().item() < 1.2
    assert (decoded - images).abs().mean() < 0.02
    counts = torch.tensor([scene.count for scene in scenes])
    colors = torch.tensor([COLORS[scene.color] for scene in scenes])
    assert exact_count(decoded, counts, colors).float().mean() > 0.95


def test_model_counts_about_as_its_table_says(pipeline):
    # 64 images of one and two shapes: the standard error is about 0.06, three of them are allowed
    record = json.loads((pipeline_path() / "quality.json").read_text())["records"][2]
    setting = SamplerSetting(*(record[name] for name in SamplerSetting.__dataclass_fields__))
    accuracy = accuracy_by_count(pipeline, setting, images_per_prompt=4, counts=(1, 2), seed=99)
    expected = (record["accuracy"]["1"] + record["accuracy"]["2"]) / 2
    assert expected > 0.6
    assert (accuracy[1] + accuracy[2]) / 2 > expected - 0.18


def test_committed_table_reaches_the_aim():
    records = json.loads((pipeline_path() / "quality.json").read_text())["records"]
    documented = records[0]
    aims = {"1": 0.8, "2": 0.65, "3": 0.5, "4": 0.4, "5": 0.25}
    assert all(documented["accuracy"][count] >= aim for count, aim in aims.items())
    assert all(record["mean"] < 0.9 for record in records)  # room for reinforcement learning


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_sde_sampler_approaches_the_pipelines_ode(pipeline, guidance_scale):
    prompts = ["three red circles", "two blue squares"]
    ode = SamplerSetting(6, guidance_scale)
    sde = SamplerSetting(6, guidance_scale, noise_level=1e-4)
    expected = sample_images(pipeline, prompts, ode, _generator(3))
    actual = sample_images(pipeline, prompts, sde, _generator(3))
    assert (actual - expected).abs().max() < 5e-3  # noise of 1e-4 standard deviations per step
    noisy = sample_images(
        pipeline, prompts, SamplerSetting(6, guidance_scale, noise_level=0.7), _generator(3)
    )
    assert (noisy - expected).abs().max() > 0.05


@pytest.mark.parametrize("build", [build_sd3_pipeline, build_flux_pipeline])
def test_builders_are_deterministic(build):
    state = torch.get_rng_state()
    first, again, other = build(1), build(1), build(2)
    assert torch.equal(torch.get_rng_state(), state)
    for name, module in pipeline_modules(first).items():
        weights, same = module.state_dict(), pipeline_modules(again)[name].state_dict()
        assert all(torch.equal(weights[key], same[key]) for key in weights), name
        assert not any(part.training for part in module.modules()), name
    key = "proj_out.weight"
    assert not torch.equal(first.transformer.state_dict()[key], other.transformer.state_dict()[key])


def test_flux_pipeline_saves_reloads_and_runs(tmp_path):
    flux = build_flux_pipeline(0)

    def sample(pipe):
        return pipe(
            ["two red circles", "one blue square"],
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_inference_steps=2,
            max_sequence_length=16,
            generator=_generator(),
            output_type="pt",
        ).images

    flux.save_pretrained(tmp_path)
    again = type(flux).from_pretrained(tmp_path, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    images = sample(flux)
    assert images.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert images.isfinite().all()
    assert torch.equal(images, sample(again))
