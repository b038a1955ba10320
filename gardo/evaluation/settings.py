"""From a request to what is done: contenders of one base, prompts, rewards and their roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gardo.config import Config, ModelConfig, RewardsConfig, load_config, validate
from gardo.data.prompts import load_prompts
from gardo.evaluation.request import BASE, Request
from gardo.evaluation.sources import (
    Source,
    check_same_base,
    find_source,
    model_digest,
    weights_digest,
)
from gardo.models.loading import resolve_path
from gardo.types import Prompt, UserError

PROXY, AUX, HELD_OUT = "proxy", "auxiliary", "held out"


@dataclass(frozen=True)
class Contender:
    """A policy that is compared.

    Attributes:
        name: in tables.
        source: where its weights are.
        model: the pipeline that it is, or that its weights go on.
        weights: hashes of everything that it consists of.
        proxy: the rewards that it was trained on, with their weights; empty if nobody says.
        described: its weights in words.
    """

    name: str
    source: Source
    model: ModelConfig
    weights: Mapping[str, str]
    proxy: Mapping[str, float]
    described: str


@dataclass(frozen=True)
class Settings:
    """An evaluation in full.

    Attributes:
        config: of the first run, or of the recipe, with what the request changes in it.
        contenders: the base first, if it is one.
        base: the model that adapters go on; None where only whole pipelines are compared.
        rewards: what scores; its proxy is the first run's.
        roles: proxy, auxiliary or held out, for every reward that scores.
        notes: what a reader of the tables should know.
    """

    config: Config
    contenders: Sequence[Contender]
    base: ModelConfig | None
    with_base: bool
    prompts: Sequence[Prompt]
    seeds: Sequence[int]
    kl_seeds: int
    steps: int
    guidance: float
    batch_size: int
    rewards: RewardsConfig
    roles: Mapping[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def compared(self) -> Sequence[Contender]:
        """The contenders without the base."""
        return [c for c in self.contenders if not (self.with_base and c.name == BASE)]


def resolve(request: Request) -> Settings:
    """Fill a request up from the first run's configuration, and check it; loads no model.

    Raises:
        UserError: a path, name or number that cannot be used, or contenders of several base models.
    """
    sources = [find_source(text) for text in request.runs]
    config = _configuration(request, sources)
    base = _base_model(request, sources, config)
    prompts = _prompts(request, config)
    seeds = list(request.seeds or range(config.evaluation.samples_per_prompt))
    contenders = _contenders(request, sources, config, base)
    rewards, roles = _rewards(request, sources, config)
    guidance = config.evaluation.guidance_scale
    guidance = config.sampling.guidance_scale if guidance is None else guidance
    images = len(prompts) * len(seeds)
    settings = Settings(
        config=config,
        contenders=contenders,
        base=base,
        with_base=request.with_base,
        prompts=prompts,
        seeds=seeds,
        kl_seeds=min(request.kl_seeds, len(seeds)) if request.with_base else 0,
        steps=request.steps or config.evaluation.num_steps,
        guidance=guidance if request.guidance is None else request.guidance,
        batch_size=min(request.batch_size or config.sampling.batch_size, images),
        rewards=rewards,
        roles=roles,
    )
    settings.notes.extend(_notes(request, sources, settings))
    return settings


def _configuration(request: Request, sources: Sequence[Source]) -> Config:
    """The recipe's, the first run's, or, if all is said on the command line, an own one."""
    runs = [source.run for source in sources if source.run is not None]
    if request.recipe is not None:
        config = load_config(request.recipe, to_evaluate=True)
    elif runs:
        config = runs[0]
    else:
        config = _bare(request)
    sampling = config.sampling.model_copy(
        update={
            "resolution": request.resolution or config.sampling.resolution,
            "guidance_scale": config.sampling.guidance_scale
            if request.guidance is None
            else request.guidance,
        }
    )
    update = {
        "sampling": sampling,
        "precision": request.precision or config.precision,
        "device": request.device or config.device,
    }
    return config.model_copy(update=update)


def _bare(request: Request) -> Config:
    """Settings where no run and no recipe says them."""
    needed = {
        "--prompts": request.prompts,
        "--rewards": request.rewards,
        "--guidance": request.guidance,
    }
    absent = [name for name, value in needed.items() if value is None]
    if absent:
        raise UserError(
            f"{', '.join(absent)}: expected a value, because none of --runs is a run folder that "
            "says it; or give --recipe NAME"
        )
    return validate(
        {
            "prompts": {"path": str(request.prompts)},
            "rewards": {"proxy": request.rewards[0], "eval": list(request.rewards[1:])}
            if request.rewards
            else {},
            "algorithm": {"kl_coef": 0.0, "diversity": False},
            "sampling": {"guidance_scale": request.guidance, "batch_size": 8},
        }
    )


def _base_model(request: Request, sources: Sequence[Source], config: Config) -> ModelConfig | None:
    """The model that adapters go on and that the others are compared with."""
    runs = [source for source in sources if source.run is not None]
    if request.base is not None:
        found = find_source(request.base, "--base")
        if found.model is None:
            raise UserError(
                f"--base '{request.base}': expected a pipeline folder or a hub id, got "
                f"{'a run folder' if found.run else 'weights without a pipeline'}"
            )
        update = {"path": found.model.path, "revision": found.model.revision}
        return config.model.model_copy(update={**update, "variant": None, "family": "auto"})
    if runs:
        _check_one_base(runs)
        first = runs[0].run
        return first.model if first is not None else None
    if request.recipe is not None:
        return config.model
    adapters = [source.given for source in sources if source.model is None]
    if request.with_base or adapters:
        why = f"'{adapters[0]}' is weights for one" if adapters else "others are compared with it"
        hint = "" if adapters else ", or --no_base"
        raise UserError(f"--base: expected the base model's folder or hub id, because {why}{hint}")
    return None


def _check_one_base(runs: Sequence[Source]) -> None:
    def identity(source: Source) -> tuple[str, ...]:
        model = source.run.model if source.run is not None else ModelConfig()
        try:
            path = resolve_path(model.path)
        except UserError as error:
            raise UserError(
                f"--runs '{source.given}': {error}; where it is now, say with --base PATH"
            ) from None
        return path, str(model.revision), str(model.variant)

    first = identity(runs[0])
    for source in runs[1:]:
        if identity(source) != first:
            models = [s.run.model.path for s in (runs[0], source) if s.run is not None]
            raise UserError(
                f"--runs: expected contenders of one base model, got '{runs[0].given}' of "
                f"'{models[0]}' and '{source.given}' of '{models[1]}' (if these are the same "
                "model in two places, say which with --base PATH)"
            )


def _contenders(
    request: Request, sources: Sequence[Source], config: Config, base: ModelConfig | None
) -> list[Contender]:
    base_digest = "" if base is None else _digest_of(base)
    names = _names(request, sources)
    proxy = {} if _is_bare(request, sources) else config.rewards.proxy_weights
    found = []
    if request.with_base and base is not None:
        source = Source(base.path, "pipeline", BASE, model=base)
        found.append(Contender(BASE, source, base, {"model": base_digest}, proxy, "base model"))
    for name, source in zip(names, sources, strict=True):
        if source.model is not None:
            options = base or config.model
            model = options.model_copy(
                update={"path": source.model.path, "revision": source.model.revision}
            )
            if base is not None and model.path != base.path:
                model = model.model_copy(update={"variant": None, "family": "auto"})
            weights = {"model": _digest_of(model)}
        elif base is not None:
            model = base
            weights = {"model": base_digest, source.kind: weights_digest(source)}
        else:
            raise ValueError("base: expected a model, got None")
        if base is not None and source.kind != "lora":
            check_same_base(source, model, base)
        trained = source.run.rewards.proxy_weights if source.run is not None else proxy
        found.append(Contender(name, source, model, weights, trained, _described(source)))
    return found


def _digest_of(model: ModelConfig) -> str:
    try:
        return model_digest(model)
    except UserError as error:
        raise UserError(f"{error}; where the base model is, can be said with --base PATH") from None


def _described(source: Source) -> str:
    kind = {"lora": "LoRA", "transformer": "full transformer", "pipeline": "pipeline"}[source.kind]
    if source.run is None:
        return kind
    average = "moving average" if source.run.train.ema else "last weights"
    return f"{kind} of a run of {source.run.epochs} epochs, {average}"


def _is_bare(request: Request, sources: Sequence[Source]) -> bool:
    return request.recipe is None and all(source.run is None for source in sources)


def _names(request: Request, sources: Sequence[Source]) -> list[str]:
    if request.names is not None:
        names = list(request.names)
        if len(names) != len(sources):
            raise UserError(
                f"--names: expected {len(sources)} names, one for each of --runs, got {len(names)}"
            )
        for name in names:
            if not name.strip() or not name.isprintable():
                raise UserError(f"--names: expected printable names, got {name!r}")
            if name == BASE and request.with_base:
                raise UserError(f"--names: '{BASE}' is the base model; choose another name")
            if names.count(name) > 1:
                raise UserError(f"--names: expected different names, got '{name}' twice")
        return names
    names = []
    taken = {BASE} if request.with_base else set()
    for source in sources:
        name, number = source.name, 2
        while name in taken:
            name, number = f"{source.name} ({number})", number + 1
        taken.add(name)
        names.append(name)
    return names


def _prompts(request: Request, config: Config) -> list[Prompt]:
    """Those of the file, or the first of the configuration's, as its own evaluations take them."""
    update: dict[str, object] = {"per_epoch": 1}
    most = request.max_prompts
    if request.prompts is not None:
        update |= {"path": str(request.prompts), "split": request.split or "test"}
    else:
        most = most or config.evaluation.max_prompts
        update |= {"split": request.split or config.prompts.split}
    return load_prompts(config.prompts.model_copy(update=update))[:most]


def _rewards(
    request: Request, sources: Sequence[Source], config: Config
) -> tuple[RewardsConfig, dict[str, str]]:
    """What scores: the rewards asked for, and those that contenders were trained on.

    A reward is held out if no contender was trained on it or with its advice.
    """
    bare = _is_bare(request, sources)
    first = config.rewards
    every = [first, *(source.run.rewards for source in sources if source.run is not None)]
    proxies = {} if bare else dict.fromkeys(name for r in every for name in r.proxy_weights)
    advisers = dict.fromkeys(name for r in every for name in r.aux)
    asked = list(request.rewards or ([] if bare else [*first.aux, *first.eval]))
    names = list(dict.fromkeys([*proxies, *asked]))
    roles = {
        name: PROXY if name in proxies else AUX if name in advisers else HELD_OUT for name in names
    }
    features = first.features if request.features is None else request.features
    features = None if features == "none" else features
    known = {*names, *([features] if features else [])}
    parameters = {k: v for r in reversed(every) for k, v in r.parameters.items() if k in known}
    servers = {k: v for r in reversed(every) for k, v in r.servers.items() if k in known}
    rewards = first.model_copy(
        update={
            "proxy": names[0] if bare else first.proxy,
            "aux": [],
            "eval": [name for name in names if bare is False or name != names[0]],
            "parameters": parameters,
            "servers": servers,
            "features": features,
        }
    )
    return rewards, roles


def _notes(request: Request, sources: Sequence[Source], settings: Settings) -> list[str]:
    """Differences between the runs, of which only the first one's settings are used."""
    notes, config = [], settings.config
    compared = {
        "evaluation.num_steps": lambda c: c.evaluation.num_steps,
        "sampling.guidance_scale": lambda c: c.sampling.guidance_scale,
        "sampling.num_steps": lambda c: c.sampling.num_steps,
        "sampling.noise_level": lambda c: c.sampling.noise_level,
        "sampling.sde": lambda c: c.sampling.sde,
        "sampling.resolution": lambda c: c.sampling.resolution,
        "precision": lambda c: c.precision,
        "rewards.parameters": lambda c: {
            k: v for k, v in c.rewards.parameters.items() if k in settings.roles
        },
    }
    first = next((source.run for source in sources if source.run is not None), config)
    for source in sources:
        if source.run is None:
            continue
        for key, get in compared.items():
            if get(source.run) != get(first):
                notes.append(
                    f"{source.given}: {key} is {get(source.run)!r} in its own run; all contenders "
                    f"are evaluated with the first run's, {get(first)!r}"
                )
    if len(settings.prompts) == 1:
        notes.append("one prompt: there are no others to draw, hence no intervals")
    elif len(settings.prompts) < 10:
        notes.append(
            f"{len(settings.prompts)} prompts: intervals of so few are narrower than they should be"
        )
    if HELD_OUT not in settings.roles.values():
        notes.append("no held-out reward: every reward was trained on or advised, so no gap")
    if settings.rewards.features is None:
        notes.append("no feature extractor: no diversity")
    elif len(settings.seeds) < 2:
        notes.append("one seed: diversity needs two images of a prompt")
    return notes
