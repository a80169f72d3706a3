"""From a request (methods, protocols, data, seeds) to records: pretrain once, evaluate by every protocol."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import filelock
import torch
from torch import Tensor, nn

from mimbench import checkpoint, config, data, database, distributed, paths, record, registry, seeds
from mimbench import weights as published
from mimbench.data import Dataset, Split
from mimbench.encoder import Encoder
from mimbench.environment import environment, git
from mimbench.errors import ConfigError, MimbenchError, ResultsError, UnknownName
from mimbench.fit import History, Recipe, fit
from mimbench.optim import make_optimizer
from mimbench.progress import Progress, quiet
from mimbench.record import DataUsed, EncoderUsed, MethodUsed, Pretraining, ProtocolUsed, Record
from mimbench.task import Context, Result, Task

T = TypeVar("T")
Loader = Callable[[str, Progress], Dataset]

# Masks come from these scenes where the data that was pretrained on has none.
DENSE = {"digits": "digit-scenes"}
DENSE_DEFAULT = "camvid"


@dataclass(frozen=True)
class Request:
    """What the user asked for, as the command line gives it."""

    methods: tuple[str, ...]  # "slug", or "timm:NAME"
    protocols: tuple[str, ...] = ()  # "name" or "name:recipe"
    dataset: str = "digits"  # pretrained on, and evaluated on unless eval_dataset says otherwise
    eval_dataset: str | None = None
    preset: str | None = None  # none: the one that suits the data
    seeds: tuple[int, ...] = (0,)
    overrides: tuple[str, ...] = ()  # key=value of the method, or protocol.key=value
    weights: Path | None = None  # a published checkpoint, instead of pretraining
    device: str = "auto"
    force: bool = False  # repeat what is recorded already
    may_pretrain: bool = True  # False: use what is pretrained, else fail
    database: bool = True  # bring it up to date after each run; what reads it does so too


@dataclass
class Outcome:
    """One line of the summary."""

    record: Record
    file: Path | None
    repeated: bool  # False when an earlier record was found


@dataclass
class Pretrained:
    """A method's model after training, with everything that says how it came to be."""

    slug: str
    config: Any
    model: nn.Module
    encoder: Encoder
    split: Split
    history: History
    key: str
    folder: Path
    seed: int

    @property
    def recipe(self) -> Recipe:
        recipe: Recipe = self.config.recipe
        return recipe


def choose_device(name: str) -> torch.device:
    """``auto`` is the first GPU, or the CPU; of several processes on a machine each takes a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"'{name}' is not a device", "Try auto, cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"'{name}' is not a device that mimbench runs on", "Try auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no usable GPU here", "Use --device cpu")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type == "cuda" and distributed.launched() > 1:
        if device.index is not None:
            raise ConfigError(f"{name} cannot serve {distributed.launched()} processes", "Use --device cuda")
        device = torch.device("cuda", distributed.local_rank())
    if (device.index or 0) >= count:
        raise ConfigError(f"there is no {device} here", f"The last one is {device.type}:{count - 1}")
    return device


def run(request: Request, progress: Progress) -> Iterator[Outcome]:
    """Yields an outcome for every (method, seed, protocol), pretraining each (method, seed) once.

    Every name, setting and data set is checked before anything is trained. A run that is recorded already
    is not repeated unless ``request.force``. What another process is at comes last, and is then waited for.

    Of processes that torchrun has started all pretrain, together; then the first evaluates alone.
    """
    device = choose_device(request.device)
    if distributed.launched() > 1:
        if request.may_pretrain:
            for _ in _pretrain_together(request, device, progress, needed=Unit.unrecorded):
                pass
        if distributed.launched_as():
            return
    for unit in in_turn(units(request, progress), Unit.busy):
        pretrained: Pretrained | None = None
        for job in in_turn(unit.jobs, Job.busy):
            if (known := job.recorded()) is not None and not request.force:
                yield Outcome(known, job.file, repeated=False)
                continue
            if pretrained is None:
                pretrained = unit.pretrain(device, progress)
            yield job.evaluate(pretrained, device, progress)


def pretrain_all(request: Request, progress: Progress) -> Iterator[Pretrained]:
    """Pretrains every (method, seed) of a request, those last that another process is at.

    Of processes that torchrun has started the first alone yields what they trained together.
    """
    device = choose_device(request.device)
    if distributed.launched() > 1:
        yield from _pretrain_together(request, device, progress, needed=lambda unit: True)
        return
    for unit in in_turn(units(request, progress), Unit.busy):
        yield unit.pretrain(device, progress)


def _pretrain_together(
    request: Request, device: torch.device, progress: Progress, needed: Callable[[Unit], bool]
) -> Iterator[Pretrained]:
    """Pretrains, by all processes of torchrun, the (method, seed) that the first one finds ``needed``."""
    with distributed.together(device):
        progress = progress if distributed.first() else quiet()
        found = distributed.one_after_the_first(lambda: units(request, progress))
        for unit, wanted in zip(found, distributed.share([needed(unit) for unit in found]), strict=True):
            if wanted:
                pretrained = unit.pretrain(device, progress)
                if distributed.first():
                    yield pretrained


def units(request: Request, progress: Progress, load: Loader | None = None) -> list[Unit]:
    """All (method, seed) of a request with their runs, every name, setting and data set checked.

    ``load`` stands in for ``data.load``, for a caller who has the data at hand.
    """
    load = load or data.load
    plan = _Plan(request)
    dataset = load(request.dataset, progress)
    settings = [plan.method_settings(method, dataset) for method in plan.methods]
    targets = _targets(plan, dataset, progress, load)
    return [
        Unit(
            *(plan, method, config_, seed, dataset),
            [Job(plan, method, seed, config_, p, dataset, targets[p.name]) for p in plan.protocols],
        )
        for method, config_ in zip(plan.methods, settings, strict=True)
        for seed in request.seeds
    ]


def in_turn(items: Iterable[T], busy: Callable[[T], bool]) -> Iterator[T]:
    """Each item once, those first that are not ``busy`` when their turn comes."""
    waiting = list(items)
    while waiting:
        free = next((item for item in waiting if not busy(item)), waiting[0])
        waiting.remove(free)
        yield free


@dataclass
class Bench:
    """One trained encoder before the data that it is scored on: any settings of a protocol can be tried there."""

    name: str  # for people: the method, its preset and the seed
    pretrained: Pretrained
    target: Dataset
    settings: list[Any]  # those of the protocols that were asked for, in that order
    device: torch.device
    progress: Progress
    reads: int = 0  # of the test labels, so far

    def score(self, protocol: str, settings: Any) -> Result:
        """What a protocol finds of the encoder. Features are kept; nothing is recorded."""
        module = registry.load_protocol(protocol)
        work = config.digest("bench", self.pretrained.key, self.target.fingerprint, protocol, settings)
        folder = paths.cache() / "evaluate" / self.pretrained.slug / work
        context = Context(
            *(self.device, self.pretrained.seed, self.progress),
            workdir=folder,
            cache=self.pretrained.folder / "features",
            pretrain_step=pretraining_step(self.pretrained, self.device),
        )
        encoder = _frozen_copy(self.pretrained)
        task = Task(self.target.train, self.target.test)
        found: Result = module.evaluate(encoder, task, settings, context)
        self.reads += task.reads
        shutil.rmtree(folder, ignore_errors=True)
        return found


def bench(request: Request, progress: Progress) -> Bench:
    """The encoder of a request for one method, one seed and recipes of one protocol.

    Raises ConfigError where it has not been pretrained and ``request.may_pretrain`` is False.
    """
    plan = _Plan(request)
    device = choose_device(request.device)
    dataset = data.load(request.dataset, progress)
    (method,), (seed,) = plan.methods, request.seeds
    settings = plan.method_settings(method, dataset)
    targets = _targets(plan, dataset, progress)
    pretrained = plan.pretrain(method, settings, dataset, seed, device, progress)
    mine = [item for item in request.overrides if item.partition(".")[0].strip() not in registry.protocols()]
    name = ", ".join([method.text, f"{plan.preset(dataset)} preset", *mine, f"seed {seed}"])
    target = targets[plan.protocols[0].name]
    return Bench(name, pretrained, target, [p.settings for p in plan.protocols], device, progress)


def pretrain(
    slug: str,
    settings: Any,
    dataset: Dataset,
    seed: int,
    device: torch.device,
    progress: Progress,
    *,
    preset: str,
    weights: Path | None = None,
    may_train: bool = True,
) -> Pretrained:
    """Trains a method, or loads what an earlier run trained with the same code, config, data and seed.

    An interrupted training goes on where it stopped. When another process trains the same, this one waits
    for it. With ``weights`` nothing is trained. A teacher that is a run of this suite is trained first, with the
    same preset, data and seed.
    """
    if distributed.size() > 1 and weights is None and (reason := registry.method(slug).one_process):
        raise ConfigError(
            f"{slug} cannot be trained by {distributed.size()} processes: {reason}",
            "Start it without torchrun; recipe.accumulate saves memory",
        )
    module = registry.load_method(slug)
    split = dataset.train
    seeds.seed_everything(seed, "weights")
    model: nn.Module = module.Model(settings)
    if weights is not None:
        match = published.load(weights, slug, settings, model)
        whole = "" if match.whole else ", the encoder alone"
        progress.say(f"{slug} with the weights of {weights.name}{whole}")
        key = pretraining_key(slug, settings, split, seed, published.digest(weights))
        folder = pretraining_folder(slug, key)
        return _ready(Pretrained(slug, settings, model, None, split, History(), key, folder, seed), device)  # type: ignore[arg-type]
    check_needs(slug, model.needs, dataset)  # type: ignore[arg-type]
    teacher = None
    if reference := getattr(settings, "teacher", ""):
        teacher = _teacher(reference, slug, dataset, seed, device, progress, preset, may_train)
        model.load_teacher(teacher.encoder)  # type: ignore[operator]
    key = pretraining_key(slug, settings, split, seed, *_origin(settings, teacher.key if teacher else None))
    folder = pretraining_folder(slug, key)
    if not may_train and not (folder / "history.json").is_file():
        raise ConfigError(
            f"{slug}, seed {seed}, has not been pretrained on '{dataset.name}' with these settings",
            "Run 'mimbench pretrain' with the same options first",
        )
    train: Callable[..., History] = getattr(module, "pretrain", fit)
    with contextlib.ExitStack() as stack:
        if distributed.first():
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as fault:
                raise MimbenchError(
                    f"the cache {folder} cannot be written: {fault.strerror}",
                    "Set MIMBENCH_CACHE to a folder that can",
                ) from None
            what = f"pretraining {slug} on {dataset.name}, seed {seed}"
            stack.enter_context(_only_one(folder / ".lock", what, progress))
            file = folder / "config.json"
            if not file.is_file():  # what is trained can be used where nothing can be written
                checkpoint.save_json(file, {"method": slug, "config": config.to_dict(settings)})
        history = train(
            model,
            split,
            settings.recipe,
            seed=seed,
            device=device,
            progress=progress,
            folder=folder,
            name=f"pretraining {slug}",
        )
    if teacher is not None:
        history.warnings.append(teacher.note)
    return _ready(Pretrained(slug, settings, model, None, split, history, key, folder, seed), device)  # type: ignore[arg-type]


def check_needs(slug: str, needs: Iterable[str], dataset: Dataset) -> None:
    """Raises ConfigError where the data do not have what a model with these ``needs`` learns from."""
    for need in needs:
        if need not in dataset.train.offers:
            raise ConfigError(
                f"{slug} with these settings needs {need}, which '{dataset.name}' does not have",
                "Choose other data with --dataset" + (": digit-scenes or camvid" if need == "frames" else ""),
            )


def _ready(pretrained: Pretrained, device: torch.device) -> Pretrained:
    """The same with its encoder, on the device and in evaluation mode."""
    pretrained.model.to(device).eval()
    pretrained.encoder = pretrained.model.encoder()  # type: ignore[operator]
    return pretrained


@dataclass(frozen=True)
class _Teacher:
    """A frozen encoder that a method learns from."""

    encoder: Encoder
    key: str  # names its weights
    note: str  # what a reader of the record should know


def _teacher(
    reference: str,
    slug: str,
    dataset: Dataset,
    seed: int,
    device: torch.device,
    progress: Progress,
    preset: str,
    may_train: bool,
) -> _Teacher:
    """The encoder that a ``teacher`` setting names.

    ``run:SLUG KEY=VALUE ...`` is another method of this suite, with the same preset unless ``run:SLUG:PRESET``
    names another; ``timm:NAME`` a published model; anything else the path of a checkpoint.
    """
    first = reference.split()[0]
    kind, _, rest = first.partition(":")
    if kind == "run":
        other = _taught_by(reference, slug, dataset, preset)
        trained = pretrain(
            *(other.slug, other.settings, dataset, seed, device, progress),
            preset=other.preset,
            may_train=may_train,
        )
        history = trained.history
        cost = f"{history.images} images in {history.seconds:.0f} s, which are not counted here"
        return _Teacher(trained.encoder, trained.key, f"the teacher {reference} saw {cost}")
    if kind == "timm":
        module = registry.load_method("timm")
        encoder = module.Model(module.Config(name=rest)).encoder().to(device).eval()
        return _Teacher(encoder, first, f"the teacher is {reference}, trained elsewhere")
    file = _teacher_file(reference)
    found, _ = published.recognise(file, tuple(registry.methods()), {})
    if not found:
        raise ConfigError(
            f"the teacher {file} fits no method of this suite", f"See 'mimbench weights {file}'"
        )
    match = found[0]
    model = registry.load_method(match.slug).Model(match.config)
    model.load_state_dict(match.state, strict=False)
    note = f"the teacher is {file.name}, read as {match.slug}, trained elsewhere"
    return _Teacher(model.to(device).eval().encoder(), published.digest(file), note)


def _teacher_file(reference: str) -> Path:
    file = Path(reference).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"there is no teacher '{reference}'",
            "Write run:SLUG for a method of this suite, timm:NAME, or the path of a checkpoint",
        )
    return file


@dataclass(frozen=True)
class Wanted:
    """A pretraining that a run needs, before it is done."""

    method: str  # as --method takes it
    slug: str
    settings: Any
    preset: str
    overrides: tuple[str, ...]  # key=value of the method, over the preset
    key: str = ""  # once it is known

    @property
    def folder(self) -> Path:
        """Where its weights are, or will be."""
        return pretraining_folder(self.slug, self.key)

    @property
    def done(self) -> bool:
        """Whether its weights are there."""
        return (self.folder / "history.json").is_file()

    @property
    def busy(self) -> bool:
        """Whether a process, which may be on another machine that shares the cache, trains it now."""
        return held(self.folder / ".lock")


def _taught_by(reference: str, slug: str, dataset: Dataset, preset: str) -> Wanted:
    """The run that ``run:SLUG KEY=VALUE ...`` names as the teacher of ``slug``, with its data filled in."""
    first, *overrides = reference.split()
    other, _, chosen = first.removeprefix("run:").partition(":")
    if other == slug:
        raise ConfigError(f"{slug} cannot be its own teacher", "Choose another with --set teacher=run:mae")
    preset = chosen or preset
    table = config.merge(registry.method(other).preset(preset), config.parse_overrides(overrides))
    settings = fill_in(other, config.build(registry.load_method(other).Config, table), dataset)
    return Wanted(other, other, settings, preset, tuple(overrides))


def lineage(wanted: Wanted, dataset: Dataset, seed: int) -> list[Wanted]:
    """The pretrainings that one asks for, in an order in which they can be done: teachers, then itself."""
    earlier: list[Wanted] = []
    teacher = None
    if reference := getattr(wanted.settings, "teacher", ""):
        first = reference.split()[0]
        if first.startswith("run:"):
            taught_by = _taught_by(reference, wanted.slug, dataset, wanted.preset)
            earlier = lineage(taught_by, dataset, seed)
            teacher = earlier[-1].key
        else:
            teacher = first if first.startswith("timm:") else published.digest(_teacher_file(reference))
    origin = _origin(wanted.settings, teacher)
    key = pretraining_key(wanted.slug, wanted.settings, dataset.train, seed, *origin)
    return [*earlier, dataclasses.replace(wanted, key=key)]


def _origin(settings: Any, teacher: str | None) -> list[str]:
    """What weights depend on besides code, config, data and seed: the key of a teacher, the tokenizer's file."""
    file = getattr(settings, "tokenizer_weights", "")
    return [*([teacher] if teacher else []), *([published.digest(Path(file))] if file else [])]


def fill_in(slug: str, settings: Any, dataset: Dataset) -> Any:
    """The Config with what only the data can tell: the number of classes."""
    if not hasattr(settings, "classes"):
        return settings
    count = len(dataset.train.classes)
    if not count:
        raise ConfigError(f"{slug} needs labels, which '{dataset.name}' does not have")
    if settings.classes is not None and settings.classes < count:
        raise ConfigError(f"classes = {settings.classes} are fewer than the {count} of '{dataset.name}'")
    return dataclasses.replace(settings, classes=settings.classes or count)


def pretraining_key(slug: str, settings: Any, split: Split, seed: int, *origin: str) -> str:
    """Names weights by all that they depend on: code, config, data, seed, and the ``origin`` of a teacher's or
    of their own."""
    table = config.to_dict(settings)
    table["recipe"].pop("checkpoint_minutes")
    return config.digest(_training_code(slug), table, split.fingerprint, seed, *origin)


@functools.cache
def _training_code(slug: str) -> str:
    """A hash of the code that a method's weights depend on."""
    loop = (paths.PACKAGE / f"{name}.py" for name in ("encoder", "fit", "optim", "distributed", "batchwide"))
    return registry.code_hash(*loop, *registry.method_code(slug))


def pretraining_folder(slug: str, key: str) -> Path:
    """Where the weights of a key, and what training keeps until then, are in the cache."""
    return paths.cache() / "pretrain" / slug / key


@contextlib.contextmanager
def _only_one(file: Path, what: str, progress: Progress) -> Iterator[bool]:
    """Holds the lock ``file``; gives whether another process had it, which is said and waited for."""
    lock = filelock.FileLock(file)
    waited = False
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        progress.say(f"another process is {what}: waiting for it")
        waited = True
        lock.acquire()
    except OSError as fault:
        raise MimbenchError(
            f"the cache {file.parent} cannot be written: {fault.strerror or fault}",
            "Set MIMBENCH_CACHE to a folder that can",
        ) from None
    try:
        yield waited
    finally:
        lock.release()


def held(file: Path) -> bool:
    """Whether another process holds the lock ``file`` now."""
    if not file.is_file():
        return False
    lock = filelock.FileLock(file)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    except OSError:  # it cannot be written, so nobody has begun to
        return False
    lock.release()
    return False


@dataclass(frozen=True)
class _Method:
    """A method with the settings given for it."""

    text: str  # as it was asked for: "mae", "timm:resnet50"
    slug: str
    overrides: dict[str, Any]


@dataclass(frozen=True)
class _Choice:
    """A protocol with the recipe and settings chosen for it."""

    name: str
    recipe: str
    module: ModuleType
    settings: Any


class _Plan:
    """A request with every name looked up and every setting checked."""

    def __init__(self, request: Request) -> None:
        self.request = request
        if request.weights is not None and len(request.methods) > 1:
            raise ConfigError(
                "weights are of one method, but several were asked for", "Name one with --method"
            )
        asked = config.parse_overrides(request.overrides)
        known = registry.protocols()
        self.protocol_overrides = {k: v for k, v in asked.items() if k in known}
        self.method_overrides = {k: v for k, v in asked.items() if k not in known}
        self.methods = [self._method(text) for text in request.methods]
        self.protocols = [self._protocol(text) for text in request.protocols]
        asked_for = {choice.name for choice in self.protocols}
        for name in self.protocol_overrides:
            if request.protocols and name not in asked_for:
                raise ConfigError(f"settings for '{name}' were given, but it is not among the protocols")
        for method in self.methods:
            card = registry.method(method.slug)
            for choice in self.protocols:
                if choice.name not in card.protocols:
                    raise ConfigError(
                        f"{method.slug} does not support the protocol '{choice.name}'",
                        f"It supports {', '.join(card.protocols)}",
                    )
            if request.preset is not None:
                self._build(method, request.preset)

    def _method(self, text: str) -> _Method:
        slug, _, name = text.partition(":")
        registry.method(slug)
        if name and slug != "timm":
            raise ConfigError(f"'{text}' has a name after the method", f"Write {slug}, or timm:NAME")
        overrides = {**self.method_overrides, **({"name": name} if name else {})}
        if slug == "timm" and self.request.weights is not None:
            overrides["pretrained"] = False
        return _Method(text, slug, overrides)

    def _protocol(self, text: str) -> _Choice:
        name, _, recipe = text.partition(":")
        module = registry.load_protocol(name)
        recipe = recipe or next(iter(module.RECIPES))
        if recipe not in module.RECIPES:
            raise UnknownName(f"recipe of {name}", recipe, module.RECIPES)
        changes = self.protocol_overrides.get(name, {})
        if not isinstance(changes, dict):
            raise ConfigError(f"'{name}={changes}' sets a protocol as a whole", f"Write {name}.KEY=VALUE")
        if "recipe" in changes:
            raise ConfigError(
                f"{name}.recipe is a name, not a setting", f"Write --protocol {name}:{changes['recipe']}"
            )
        table = config.merge(module.RECIPES[recipe], changes)
        settings = config.build(module.Settings, table | {"recipe": recipe}, name)
        return _Choice(name, recipe, module, settings)

    def preset(self, dataset: Dataset) -> str:
        return self.request.preset or dataset.default_preset

    def _build(self, method: _Method, preset: str) -> Any:
        table = config.merge(registry.method(method.slug).preset(preset), method.overrides)
        return config.build(registry.load_method(method.slug).Config, table)

    def method_settings(self, method: _Method, dataset: Dataset) -> Any:
        """The method's Config for this data."""
        return fill_in(method.slug, self._build(method, self.preset(dataset)), dataset)

    def pretrain(
        self,
        method: _Method,
        settings: Any,
        dataset: Dataset,
        seed: int,
        device: torch.device,
        progress: Progress,
    ) -> Pretrained:
        """See ``pretrain``."""
        return pretrain(
            *(method.slug, settings, dataset, seed, device, progress),
            preset=self.preset(dataset),
            weights=self.request.weights,
            may_train=self.request.may_pretrain,
        )


def _evaluation_data(request: Request, protocol: _Choice, dataset: Dataset) -> str:
    """Where a protocol is evaluated: what was asked for, the pretraining data, or scenes with masks."""
    if request.eval_dataset:
        return request.eval_dataset
    if any("masks" in need and not _offers(dataset.train, need) for need in protocol.module.NEEDS):
        return DENSE.get(dataset.name, DENSE_DEFAULT)
    return dataset.name


def _offers(split: Split, need: str) -> bool:
    """Whether a split has what a protocol needs, or one of several: ``"masks or points"``."""
    return any(kind in split.offers for kind in need.split(" or "))


def _targets(
    plan: _Plan,
    dataset: Dataset,
    progress: Progress,
    load: Loader | None = None,
) -> dict[str, Dataset]:
    """What each protocol is evaluated on. Raises ConfigError for data that lacks what a protocol needs."""
    loaded = {dataset.name: dataset}
    found = {}
    for protocol in plan.protocols:
        place = _evaluation_data(plan.request, protocol, dataset)
        if place not in loaded:
            loaded[place] = (load or data.load)(place, progress)
        found[protocol.name] = target = loaded[place]
        for need in protocol.module.NEEDS:
            if not _offers(target.train, need) or not _offers(target.test, need):
                raise ConfigError(
                    f"{protocol.name} needs {need}, which '{target.name}' does not have",
                    "Choose other data with --eval-dataset",
                )
    return found


@dataclass
class Unit:
    """One (method, seed) of a request: a pretraining and the runs that need it."""

    plan: _Plan
    method: _Method
    settings: Any
    seed: int
    dataset: Dataset  # pretrained on
    jobs: list[Job]

    @functools.cached_property
    def lineage(self) -> list[Wanted]:
        """The pretrainings that it needs, teachers first; none where published weights were given."""
        if self.plan.request.weights:
            return []
        overrides = tuple(
            item
            for item in self.plan.request.overrides
            if config.first_key(item) not in self.plan.protocol_overrides
        )
        wanted = Wanted(
            *(self.method.text, self.method.slug, self.settings, self.plan.preset(self.dataset), overrides)
        )
        return lineage(wanted, self.dataset, self.seed)

    def unrecorded(self) -> bool:
        """Whether a run is still to be done."""
        return self.plan.request.force or not self.jobs or not all(job.recorded() for job in self.jobs)

    def busy(self) -> bool:
        """Whether another process is at a pretraining that this one has a use for."""
        if not self.unrecorded():
            return False
        return any(wanted.busy for wanted in self.lineage)

    def pretrain(self, device: torch.device, progress: Progress) -> Pretrained:
        """See the function of this name."""
        return self.plan.pretrain(self.method, self.settings, self.dataset, self.seed, device, progress)


@dataclass
class Job:
    """One protocol on one pretrained method."""

    plan: _Plan
    method: _Method
    seed: int
    settings: Any
    protocol: _Choice
    dataset: Dataset  # pretrained on
    target: Dataset  # evaluated on

    @property
    def overrides(self) -> dict[str, Any]:
        """What --set changed for this run: settings of the method, and of this protocol under its name."""
        table = self.plan.protocol_overrides.get(self.protocol.name)
        weights = self.plan.request.weights
        return {
            **self.method.overrides,
            **({"weights": published.digest(weights)[:12]} if weights else {}),
            **({self.protocol.name: table} if table else {}),
        }

    @property
    def origin(self) -> tuple[str, str]:
        """What the weights were trained on: the name of the data, or of what was published, and its hash."""
        if weights := self.plan.request.weights:
            return weights.name, published.digest(weights)
        if getattr(self.settings, "pretrained", False):
            return "published weights", config.digest(self.method.text)
        return self.dataset.name, self.dataset.train.fingerprint

    @property
    def id(self) -> str:
        return record.run_id(
            method=self.method.slug,
            preset=self.plan.preset(self.dataset),
            overrides=self.overrides,
            pretrain_dataset=self.origin[0],
            protocol=self.protocol.name,
            recipe=self.protocol.recipe,
            dataset=self.target.name,
            seed=self.seed,
        )

    @property
    def file(self) -> Path:
        return paths.results() / "runs" / self.method.slug / self.protocol.name / f"{self.id}.json"

    @property
    def command(self) -> str:
        """What repeats this run, and nothing else."""
        request, name = self.plan.request, self.protocol.name
        words = [
            "mimbench",
            "run",
            "--method",
            self.method.text,
            "--protocol",
            f"{name}:{self.protocol.recipe}",
        ]
        words += ["--dataset", request.dataset, "--preset", self.plan.preset(self.dataset)]
        if request.weights:
            words += ["--weights", str(request.weights)]
        if request.eval_dataset:
            words += ["--eval-dataset", request.eval_dataset]
        words += ["--seed", str(self.seed)]
        others = set(registry.protocols()) - {name}
        for item in request.overrides:
            if config.first_key(item) not in others:
                words += ["--set", item]
        return shlex.join(words)

    def recorded(self) -> Record | None:
        """The record of an earlier run with today's code, settings and data, if there is a sound one."""
        if not self.file.is_file():
            return None
        try:
            earlier = record.read(self.file)
        except ResultsError:  # damaged: the run is repeated and replaces it
            return None
        same = (
            earlier.data.fingerprint == self.target.fingerprint
            and earlier.pretrain.data_fingerprint == self.origin[1]
            and earlier.config == config.to_dict(self.settings)  # a preset may have been edited
        )
        return earlier if same and record.stale(earlier) is None else None

    @property
    def lock(self) -> Path:
        """Held by the process that does this run."""
        return paths.cache() / "evaluate" / self.method.slug / f"{self.id}.lock"

    def busy(self) -> bool:
        """Whether another process is at this run."""
        return held(self.lock)

    def evaluate(self, pretrained: Pretrained, device: torch.device, progress: Progress) -> Outcome:
        """Runs the protocol and records what it found, unless another process just did."""
        self.lock.parent.mkdir(parents=True, exist_ok=True)
        what = (
            f"evaluating {self.method.text} by {self.protocol.name} on {self.target.name}, seed {self.seed}"
        )
        with _only_one(self.lock, what, progress) as waited:
            known = self.recorded() if waited and not self.plan.request.force else None
            return Outcome(known, self.file, False) if known else self._evaluate(pretrained, device, progress)

    def _evaluate(self, pretrained: Pretrained, device: torch.device, progress: Progress) -> Outcome:
        name = self.protocol.name
        # What a protocol trains goes on after an interruption, but not after a change of code or settings.
        work = config.digest(pretrained.key, self.id, record.protocol_code(name), self.protocol.settings)
        folder = paths.cache() / "evaluate" / self.method.slug / work
        context = Context(
            device,
            self.seed,
            progress,
            workdir=folder,
            cache=pretrained.folder / "features",
            pretrain_step=pretraining_step(pretrained, device),
        )
        encoder = _frozen_copy(pretrained)
        progress.say(f"evaluating {self.method.text} by {name}:{self.protocol.recipe} on {self.target.name}")
        began = time.perf_counter()
        task = Task(self.target.train, self.target.test)
        result: Result = self.protocol.module.evaluate(encoder, task, self.protocol.settings, context)
        context.seconds["total"] = time.perf_counter() - began
        made = self._record(pretrained, encoder, result, context, task.reads)
        file = record.write(made, paths.results())
        shutil.rmtree(folder, ignore_errors=True)  # recorded: nothing is left to resume
        for warning in made.warnings:
            progress.say(f"warning: {warning}")
        if self.plan.request.database:
            database.catch_up(paths.results(), progress.say)
        return Outcome(made, file, repeated=True)

    def _record(
        self, pretrained: Pretrained, encoder: Encoder, result: Result, context: Context, reads: int
    ) -> Record:
        history, choice, recipe = pretrained.history, self.protocol, pretrained.recipe
        epochs = (
            recipe.epochs if history.planned and not recipe.budget else history.images / len(pretrained.split)
        )
        return Record(
            command=self.command,
            method=MethodUsed(self.method.slug, record.method_code(self.method.slug)),
            protocol=ProtocolUsed(
                choice.name,
                registry.protocol(choice.name).version,
                choice.recipe,
                record.protocol_code(choice.name),
                config.to_dict(choice.settings),
            ),
            config=config.to_dict(self.settings),
            preset=self.plan.preset(self.dataset),
            overrides=self.overrides,
            seed=self.seed,
            pretrain=Pretraining(
                dataset=self.origin[0],
                data_fingerprint=self.origin[1],
                key=pretrained.key,
                images=history.images,
                steps=history.steps,
                epochs=epochs,
                seconds=history.seconds,
                device_seconds=history.device_seconds,
                resumed=history.resumed,
                peak_memory=history.peak_memory,
                precision=history.precision,
                compiled=history.compiled,
            ),
            data=DataUsed(
                self.target.name,
                self.target.fingerprint,
                self.target.test.note,
                len(self.target.train),
                len(self.target.test),
            ),
            encoder=EncoderUsed(
                parameters=sum(p.numel() for p in encoder.parameters()),  # type: ignore[attr-defined]
                readout=encoder.readout,
                dim=encoder.dim,
                input_size=encoder.input.size,
                input_mean=list(encoder.input.mean),
                input_std=list(encoder.input.std),
            ),
            backbone=encoder.name,
            environment=environment(str(context.device)),
            git=git(),
            seconds=dict(context.seconds),
            curve=history.curve,
            metrics=result.metrics,
            primary=result.primary,
            test_reads=record.reads_before(self.file) + reads,
            details=result.details,
            correct=None if result.correct is None else record.pack(result.correct),
            warnings=[*history.warnings, *result.warnings],
        )


def _frozen_copy(pretrained: Pretrained) -> Encoder:
    """The encoder for a protocol to use up: what one does to it, the next does not see."""
    encoder = copy.deepcopy(pretrained.encoder)
    encoder.requires_grad_(False).eval()  # type: ignore[attr-defined]
    return encoder


def pretraining_step(
    pretrained: Pretrained, device: torch.device
) -> Callable[[int], Callable[[], Tensor]] | None:
    """For a batch size, a function that does one step of this method's own training and returns the loss.

    It works on a copy, so that what is measured does not change what is evaluated. None for a method that
    is not trained.
    """
    if not pretrained.recipe.epochs or not pretrained.history.planned:
        return None

    def prepare(batch_size: int) -> Callable[[], Tensor]:
        model: Any = copy.deepcopy(pretrained.model).to(device).train()
        optimizer = make_optimizer(model, pretrained.recipe)
        positions = torch.arange(batch_size) % len(pretrained.split)
        draw = seeds.generator("cpu", pretrained.seed, "frames", 0)
        batch = pretrained.split.batch(
            positions, device, model.needs, getattr(model, "frame_gap", (1, 1)), draw
        )
        generator = seeds.generator(device, pretrained.seed, "throughput")

        def step() -> Tensor:
            with torch.no_grad():
                views = model.views(batch, generator)
            loss: Tensor = model(**views)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    return prepare
