"""Several processes against one: what they compute, how they end, and how they go on.

This file is also what the processes run: torchrun starts it with the name of a folder, in which it leaves what each of
``CASES`` finds. The tests hold that against the same functions in a process of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimbench import checkpoint, config, data, distributed, machine, record, registry, runner, seeds
from mimbench import fit as fit_module
from mimbench.batchwide import over_all_processes
from mimbench.data import Batch
from mimbench.errors import ConfigError
from mimbench.fit import History, Recipe, fit
from mimbench.models.vq import Quantiser
from mimbench.progress import quiet

CPU = torch.device("cpu")
Found = dict[str, Tensor]
CASES: dict[str, tuple[Callable[[Path], Found], float]] = {}  # with the largest relative difference allowed


def case(name: str, tolerance: float = 1e-5) -> Callable[[Callable[[Path], Found]], Callable[[Path], Found]]:
    def add(function: Callable[[Path], Found]) -> Callable[[Path], Found]:
        CASES[name] = (function, tolerance)
        return function

    return add


def own(x: Tensor) -> Tensor:
    """This process's rows."""
    rows = distributed.own_rows(len(x), 1)[0]
    return x[rows.start : rows.stop]


def gradients(model: nn.Module) -> Tensor:
    """Those of all processes together."""
    trained = [p for p in model.parameters() if p.requires_grad]
    distributed.add_gradients(trained)
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained])


# Norms and codebooks

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "of vectors": (lambda: nn.BatchNorm1d(6), (7, 6)),
    "of sequences": (lambda: nn.BatchNorm1d(6), (7, 6, 5)),
    "of maps": (lambda: nn.BatchNorm2d(6, momentum=0.3), (5, 6, 4, 3)),
    "of volumes": (lambda: nn.BatchNorm3d(6), (3, 6, 2, 2, 2)),
    "without weights": (lambda: nn.BatchNorm2d(6, affine=False), (5, 6, 4, 3)),
    "with plain averages": (lambda: nn.BatchNorm1d(6, momentum=None), (7, 6)),
    "of the batch alone": (lambda: nn.BatchNorm1d(6, track_running_stats=False), (7, 6)),
    "evaluating": (lambda: nn.BatchNorm1d(6).eval(), (7, 6)),
}


def normalised(
    make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype, mean: float
) -> Found:
    torch.manual_seed(0)
    norm = make().to(dtype if dtype == torch.float64 else torch.float32)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    inputs, weights = torch.randn(2, *shape, dtype=torch.float64).to(dtype)
    inputs += mean
    x = own(inputs).clone().requires_grad_()
    kind = type(norm)
    with over_all_processes(norm):
        for _ in range(2):
            y = norm(x)
        (y * own(weights) + y.square()).float().sum().backward()
    assert type(norm) is kind
    assert x.grad is not None
    parts = {"output": distributed.gather_rows(y), "input": distributed.gather_rows(x.grad)}
    if list(norm.parameters()):
        parts["weights"] = gradients(norm)
    return parts | {name: value.float() for name, value in norm.named_buffers()}


for _name, (_make, _shape) in NORMS.items():
    case(f"a norm {_name}")(
        lambda folder, m=_make, s=_shape: normalised(m, s, torch.float32, 0.0)  # type: ignore[misc]
    )
case("a norm in doubles", 1e-12)(lambda folder: normalised(*NORMS["of maps"], torch.float64, 0.0))
case("a norm in bfloat16", 2e-2)(lambda folder: normalised(*NORMS["of maps"], torch.bfloat16, 0.0))
# Sums of squares would lose all digits of a deviation of 1 here.
case("a norm of large values", 5e-3)(lambda folder: normalised(*NORMS["of maps"], torch.float32, 1e4))


@case("a codebook", 1e-6)
def codebook(folder: Path) -> Found:
    torch.manual_seed(0)
    quantiser = Quantiser(12, 4, decay=0.5, revive=0.9)
    z = torch.randn(3, 7, 5, 4)
    shares = []
    with over_all_processes(quantiser):
        for step in range(3):
            torch.manual_seed(step + 100 * distributed.rank())
            vectors = own(z[step])
            shares.append(quantiser(vectors)[2] * len(vectors) / 7)
    loss = distributed.batch_sum(torch.stack(shares))
    return {"codes": quantiser.codebook, "use": quantiser.use, "loss": loss}


@case("sums")
def sums(folder: Path) -> Found:
    torch.manual_seed(0)
    inputs = 0.5 + torch.rand(5, 4)
    x = own(inputs).clone().requires_grad_()
    total, most = distributed.batch_sum(x.sum(0)), distributed.batch_max(x.amax(0))
    loss = ((x / total).square() * most).sum()
    loss.backward()
    assert x.grad is not None
    return {
        "loss": distributed.batch_sum(loss.detach()),
        "gradient": distributed.gather_rows(x.grad),
        "most": most,
    }


@case("gradients that some lack", 1e-6)
def lacking(folder: Path) -> Found:
    torch.manual_seed(0)
    both, one, none = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    x = torch.randn(4, 3)
    (own(x) * both).sum().backward()
    if distributed.first():
        (x[0] * one).sum().backward()
    distributed.add_gradients([both, one, none])
    assert none.grad is None  # else weight decay would move it
    assert both.grad is not None
    assert one.grad is not None
    return {"both": both.grad, "one": one.grad}


# Methods

WITHOUT_CHANCE: dict[str, dict[str, Any]] = {
    "cropmae": {"decoder": {"dropout": 0.0}},
    "mage": {"dropout": 0.0},
}
IMAGES = 9


def model_of(slug: str, **changes: Any) -> Any:
    module = registry.load_method(slug)
    table = config.merge(registry.method(slug).preset("smoke"), changes or WITHOUT_CHANCE.get(slug, {}))
    settings = config.build(module.Config, table)
    if getattr(settings, "classes", 0) is None:
        settings = dataclasses.replace(settings, classes=10)
    seeds.seed_everything("weights")
    return module.Model(settings)


def split_of(model: Any) -> data.Split:
    return data.load("digit-scenes" if "frames" in model.needs else "digits").train


def step_of(model: Any) -> Found:
    """Loss, gradients and buffers of a step on some digits, with weights that have left their special start."""
    seeds.seed_everything("a little further")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = split_of(model).batch(torch.arange(IMAGES), needs=tuple(model.needs))
    with torch.no_grad():
        views = model.views(batch, seeds.generator("cpu", "views"))
    views = {key: own(value) if value.ndim else value for key, value in views.items()}
    seeds.seed_everything("model")
    model.train()
    with over_all_processes(model):
        loss = model(**views)["loss"] * len(distributed.own_rows(IMAGES, 1)[0]) / IMAGES
        loss.backward()
    buffers = {
        name: value.float()
        for name, value in model.named_buffers()
        if "running" in name or "codebook" in name
    }
    return {"loss": distributed.batch_sum(loss.detach()), "gradients": gradients(model), **buffers}


def tokenizer_of(slug: str) -> Any:
    tokenizer = model_of(slug).tokenizer.requires_grad_(True)
    if hasattr(tokenizer, "guide"):
        tokenizer.guide(model_of("mae").encoder().eval())
    return tokenizer


SLUGS = [slug for slug in registry.methods() if hasattr(registry.load_method(slug).Model, "views")]
ALONE = [slug for slug in SLUGS if registry.method(slug).one_process]
for _slug in (slug for slug in SLUGS if slug not in ALONE):
    case(_slug, 2e-4 if _slug == "simsiam" else 1e-5)(  # whose loss is near 0
        lambda folder, slug=_slug: step_of(model_of(slug))  # type: ignore[misc]
    )
for _slug in ("beitv2", "cae", "mage"):
    case(f"{_slug}: tokenizer")(
        lambda folder, slug=_slug: step_of(tokenizer_of(slug))  # type: ignore[misc]
    )


@case("views of own rows", 1.0)
def views_apart(folder: Path) -> Found:
    """Which methods' processes read and augment their own rows alone."""
    expected = {"mae": True, "simsiam": True, "supervised": True, "cae": False, "mage": False}
    if distributed.size() > 1:
        assert {slug: training(model_of(slug)).apart for slug in expected} == expected
        assert training(model_of("croco", pairs="frames")).apart
        assert not training(model_of("croco", pairs="other")).apart  # an image sees the next one
    return {}


def training(model: Any) -> Any:
    made = fit_module._Training(model, split_of(model), model.config.recipe, 0, CPU, quiet(), None, "")
    made._try_apart()
    return made


# Whole trainings


class Toy(nn.Module):
    """A classifier with all that a batch can hold: noise in its views, BatchNorm, a teacher, an unused weight."""

    needs = ("labels", "frames")

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Flatten(), nn.Linear(12, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 3)
            )
        self.unused = nn.Parameter(torch.ones(2, 2))
        self.register_buffer("teacher", self.net[1].weight.detach().clone())
        self.stop, self.calls = stop, 0

    def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        assert batch.frames is not None
        assert batch.labels is not None
        noise = torch.rand(batch.images.shape, generator=generator)
        return {"x": (batch.images + 0.5 * batch.frames) / 255 + 0.1 * noise, "y": batch.labels}

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, y), "accuracy": (logits.argmax(1) == y).float().mean()}

    def after_step(self, progress: float) -> None:
        self.teacher.lerp_(self.net[1].weight, 0.5 * (1 - progress))
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt


RECIPE = Recipe(
    epochs=4, batch_size=8, base_lr=0.05, lr_batch=8, ema=0.9, compile=False, checkpoint_minutes=0
)


def train(model: nn.Module, recipe: Recipe = RECIPE, folder: Path | None = None, **others: Any) -> History:
    from test_fit import toy_split

    arguments = {"split": toy_split(), "seed": 1, "device": CPU, "progress": quiet()} | others
    return fit(model, recipe=recipe, folder=folder, **arguments)


def outcome(model: nn.Module, history: History) -> Found:
    curve = torch.tensor([[point["loss"], point["accuracy"]] for point in history.curve])
    return {"curve": curve, **{name: value.detach().float() for name, value in model.state_dict().items()}}


CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "an odd batch": {"batch_size": 7},
    "in parts, clipped": {"batch_size": 11, "accumulate": 3, "clip_norm": 0.2},
    "lars": {"optimizer": "lars", "ema": None},
}
for _name, _changes in CHANGES.items():

    def trained(folder: Path, changes: dict[str, Any] = _changes) -> Found:
        model = Toy()
        return outcome(model, train(model, dataclasses.replace(RECIPE, **changes)))

    case(f"a training, {_name}", 1e-4)(trained)


@case("a training that goes on", 1e-4)
def resumed(folder: Path) -> Found:
    """Begun by one process, where there are two."""
    if distributed.size() == 1:
        return outcome(model := Toy(), train(model))
    model = Toy()
    history = train(model, folder=folder / "begun by one")
    assert history.resumed == 1
    assert 0 < model.calls < history.steps
    if distributed.first():
        assert sorted(p.name for p in (folder / "begun by one").iterdir()) == [
            "history.json",
            "model.safetensors",
        ]
    again = Toy()
    assert train(again, folder=folder / "begun by one") == history
    assert not again.calls
    return outcome(model, history)


@case("a training that is begun", 1.0)
def begun(folder: Path) -> Found:
    if distributed.size() > 1:
        try:
            train(Toy(stop=7), folder=folder / "begun by two")
        except KeyboardInterrupt:
            return {}
        raise AssertionError("it went on")
    return {}


@case("Ctrl-C", 1.0)
def interrupted(folder: Path) -> Found:
    """All processes end after the same step, though one alone was told to."""

    class Told(Toy):
        def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
            if self.calls == 6 and distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            return super().views(batch, generator)

    if distributed.size() > 1:
        model = Told()
        try:
            train(model, dataclasses.replace(RECIPE, checkpoint_minutes=60), folder / "interrupted")
        except KeyboardInterrupt:
            assert model.calls == 7
        else:
            raise AssertionError("it went on")
        distributed.wait_for_all()
        assert [place.name for place in checkpoint.places(folder / "interrupted")] == ["step-000000007"]
    return {}


@case("a choice", 1.0)
def chosen(folder: Path) -> Found:
    """The first process's watch decides what a trial comes to."""
    found, calls = machine.seconds, []

    def seconds(call: Callable[[], object], device: torch.device, count: int = 1) -> float:
        calls.append(call())
        faster = (len(calls) > fit_module.TRIAL) == distributed.first()  # of fp32, then bf16
        return 0.1 if faster else 1.0

    machine.seconds = seconds
    try:
        history = train(Toy(), dataclasses.replace(RECIPE, precision="auto", epochs=1))
    finally:
        machine.seconds = found
    assert history.precision == "bf16"
    return {}


@case("simsiam in doubles", 1e-7)
def simsiam(folder: Path) -> Found:
    """Twenty steps. In single precision rounding grows tenfold in three or four of them, in any number of processes."""

    class Doubles(nn.Module):
        needs = ()

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model.double()

        def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
            return {key: view.double() for key, view in self.model.views(batch, generator).items()}

        def forward(self, **views: Tensor) -> dict[str, Tensor]:
            return {"loss": self.model(**views)["loss"]}

        def parameter_groups(self, recipe: Recipe) -> list[dict[str, Any]]:
            return self.model.parameter_groups(recipe)

    model = Doubles(model_of("simsiam"))
    digits = data.load("digits").train
    recipe = dataclasses.replace(
        model.model.config.recipe, batch_size=24, epochs=20 / (len(digits) // 24), warmup_epochs=0.1
    )
    history = train(model, recipe, split=digits)
    assert history.steps == 20
    return {
        "curve": torch.tensor([point["loss"] for point in history.curve], dtype=torch.float64),
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
    }


def work(folder: Path) -> None:
    """What each process of torchrun does."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with distributed.together(CPU):
        assert distributed.size() == 2
        found = {}
        for name, (function, _) in CASES.items():
            began = time.perf_counter()
            found |= {f"{name}/{key}": value.detach().clone() for key, value in function(folder).items()}
            if distributed.first():
                print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
        if distributed.first():
            torch.save(found, folder / "found.pt")
    assert distributed.size() == 1


if __name__ == "__main__":
    work(Path(sys.argv[1]))


def torchrun(folder: Path, *words: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Two processes, with a cache and results of their own below ``folder``."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *options,
        *words,
    ]
    places = {"MIMBENCH_CACHE": str(folder / "cache"), "MIMBENCH_RESULTS": str(folder / "results")}
    return subprocess.Popen(
        command,
        env=os.environ | places | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(started: subprocess.Popen[str], seconds: float = 300) -> str:
    """What it printed. Fails unless it ends well."""
    try:
        said, _ = started.communicate(timeout=seconds)
    finally:
        started.kill()
    assert started.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    place = tmp_path_factory.mktemp("processes")
    with pytest.raises(KeyboardInterrupt):
        train(Toy(stop=9), folder=place / "begun by one")
    print(ended(torchrun(place, str(Path(__file__)), str(place))))
    return place


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_find_what_one_does(name: str, found: Found, tmp_path: Path) -> None:
    function, tolerance = CASES[name]
    expected = function(tmp_path)
    ours = {key.partition("/")[2]: value for key, value in found.items() if key.partition("/")[0] == name}
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        assert ours[key].shape == value.shape
        difference = (ours[key].double() - value.detach().double()).norm()
        least = min(tolerance, 1e-6)  # what should be 0 is as far from it as sums round
        assert difference <= tolerance * value.detach().double().norm() + least, key


def test_one_process_finishes_what_two_began(folder: Path) -> None:
    whole, model = Toy(), Toy()
    expected = outcome(whole, train(whole))
    (place,) = (folder / "begun by two").glob("step-000000006")
    begun = checkpoint.read_state(place)
    assert begun.step == 6
    history = train(model, folder=folder / "begun by two")
    assert model.calls == history.steps - 6
    assert history.device_seconds > begun.progress["history"]["device_seconds"] > 0
    for key, value in outcome(model, history).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


# What cannot work


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_size", 2)
    monkeypatch.setattr(distributed, "share", lambda value: value)


@pytest.mark.parametrize("slug", ALONE)
def test_a_method_that_needs_one_process_says_why(slug: str, two: None) -> None:
    request = runner.Request((slug,))
    (unit,) = runner.units(request, quiet())
    with pytest.raises(
        ConfigError, match=f"{slug} cannot be trained by 2 processes: .* batch|images.*torchrun"
    ):
        unit.pretrain(CPU, quiet())


@pytest.mark.parametrize("slug", ALONE)
def test_a_method_that_needs_one_process_does_need_it(slug: str) -> None:
    """The gradient of a batch is not that of its parts."""
    model = model_of(slug)
    seeds.seed_everything("a little further")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        views = model.views(split_of(model).batch(torch.arange(IMAGES)), seeds.generator("cpu", "views"))
    if slug == "maskfeat":  # now and then a draw of its blocks leaves an image with fewer
        views["mask"] = torch.arange(64).expand(IMAGES, -1) < torch.arange(10, 10 + IMAGES)[:, None]
    found = []
    for lengths in ([IMAGES], [5, IMAGES - 5]):
        twin = copy.deepcopy(model).train()
        for part, share in fit_module._parts(views, lengths, IMAGES):
            (twin(**part)["loss"] * share).backward()
        found.append(gradients(twin))
    assert (found[0] - found[1]).norm() / found[0].norm() > 1e-4  # rounding gives 1e-7


def test_a_batch_too_small_to_share(two: None) -> None:
    with pytest.raises(ConfigError, match="a batch of 1 images cannot be shared by 2 processes"):
        distributed.own_rows(1, 1)
    with pytest.raises(ConfigError, match="a part of 1 of the 7 images cannot be shared by 2"):
        distributed.own_rows(7, 4)


def test_rows_are_each_once_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, parts, processes in ((8, 1, 2), (7, 1, 3), (11, 3, 2), (23, 4, 5)):
        monkeypatch.setattr(distributed, "_size", processes)
        seen = []
        for rank in range(processes):
            monkeypatch.setattr(distributed, "_rank", rank)
            seen.append(distributed.own_rows(count, parts))
        in_order = [row for part in zip(*seen, strict=True) for rows in part for row in rows]
        assert in_order == list(range(count))


def test_a_view_without_an_entry_per_image_is_refused(two: None) -> None:
    class Pairs(Toy):
        def views(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
            return {key: torch.cat([value, value]) for key, value in super().views(batch, generator).items()}

    from test_fit import toy_split

    made = fit_module._Training(Pairs(), toy_split(), RECIPE, 1, CPU, quiet(), None, "")
    with pytest.raises(
        ConfigError, match=r"several processes needs one entry per image.*'x' has \d+ for \d+"
    ):
        made._try_apart()


def test_a_norm_of_unknown_kind_is_refused(two: None) -> None:
    class Own(nn.BatchNorm1d): ...

    with (
        pytest.raises(ConfigError, match="Own cannot be computed over the batch of 2 processes"),
        over_all_processes(nn.Sequential(Own(3))),
    ):
        pass


def test_draws_for_own_rows_are_those_of_the_whole_batch() -> None:
    rows = torch.tensor([1, 4, 5])
    for draw in (
        lambda count, g: torch.rand(count, generator=g),
        lambda count, g: torch.rand(count, 2, 3, generator=g, device="cpu"),
        lambda count, g: torch.randn((count, 4), generator=g),
        lambda count, g: torch.randint(9, (count,), generator=g),
        lambda count, g: torch.randint(-3, 9, (count, 2), generator=g),
        lambda count, g: torch.rand(torch.Size([count, 2]), generator=g, dtype=torch.float64),
    ):
        whole = draw(6, seeds.generator("cpu", 1))
        with distributed.DrawnForAll(rows, 6):
            assert torch.equal(draw(3, seeds.generator("cpu", 1)), whole[rows])
    with distributed.DrawnForAll(rows, 6):
        assert torch.rand(2, generator=seeds.generator("cpu", 1)).shape == (2,)
        assert torch.rand(3).shape == (3,)


def test_processes_meet_anew_in_a_store_that_remembers_others() -> None:
    store = torch.distributed.HashStore()
    store.set_timeout(timedelta(seconds=60))
    seen = set()
    for _ in range(3):  # each time the first one comes last, when the others have found the name of before
        with ThreadPoolExecutor(3) as pool:
            others = [pool.submit(distributed._meeting, store, number, 3) for number in (1, 2)]
            time.sleep(0.05)
            name = distributed._meeting(store, 0, 3)
            assert [other.result(60) for other in others] == [name, name]
        assert name not in seen
        seen.add(name)


# The command

METHODS = ("mae", "capi", "simsiam")
SETTINGS = ("recipe.batch_size=32", "recipe.epochs=0.5", "recipe.warmup_epochs=0.2")  # 22 steps
WORDS = [word for item in SETTINGS for word in ("--set", item)]


def weights(cache: Path, slug: str) -> tuple[Found, dict[str, Any]]:
    (file,) = cache.glob(f"pretrain/{slug}/*/model.safetensors")
    history: dict[str, Any] = json.loads(file.with_name("history.json").read_text())["history"]
    return checkpoint.load_tensors(file), history


def relative(ours: Found, theirs: Found) -> float:
    assert ours.keys() == theirs.keys()
    apart = sum(float((ours[key].double() - theirs[key].double()).square().sum()) for key in ours)
    return (apart / sum(float(value.double().square().sum()) for value in ours.values())) ** 0.5


@pytest.fixture(scope="module")
def commanded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What ``mimbench run`` by two processes left and said."""
    place = tmp_path_factory.mktemp("command")
    words = ("-m", "mimbench", "run", "--method", ",".join(METHODS), "--protocol", "knn", *WORDS)
    return place, ended(torchrun(place, *words))


def test_a_command_by_two_processes_gives_the_records_of_one(commanded: tuple[Path, str]) -> None:
    place, said = commanded
    assert said.count("To repeat:") == 1
    theirs, faults = record.scan(place / "results")
    assert not faults
    request = runner.Request(METHODS, ("knn",), overrides=SETTINGS)
    ours = {o.record.method.slug: o.record for o in runner.run(request, quiet())}
    assert {made.method.slug for made in theirs} == set(METHODS)
    for made in theirs:
        same = ours[made.method.slug]
        assert (made.id, made.pretrain.key, made.command) == (same.id, same.pretrain.key, same.command)
        assert min(made.pretrain.device_seconds, same.pretrain.device_seconds) > 0
        assert (made.pretrain.images, made.pretrain.steps) == (same.pretrain.images, same.pretrain.steps)
        losses = torch.tensor([[point["loss"] for point in one.curve] for one in (made, same)])
        difference = (losses[0] / losses[1] - 1).abs()
        cache = Path(os.environ["MIMBENCH_CACHE"])
        apart = relative(weights(place / "cache", made.method.slug)[0], weights(cache, made.method.slug)[0])
        print(f"{made.method.slug}: loss {float(difference.max()):.1e}, weights {apart:.1e}")
        assert len(difference) >= 20
        if made.method.slug == "simsiam":  # see "simsiam in doubles"
            assert difference[:4].max() < 1e-4
            assert difference.max() < 5e-2
        else:
            assert difference.max() < 1e-5
            assert apart < 1e-4


def rank_one(place: Path) -> int | None:
    """The process of rank 1 that works below a folder."""
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            facts = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"RANK=1" in facts and f"MIMBENCH_CACHE={place / 'cache'}".encode() in facts:
            return int(entry.parent.name)
    return None


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process to kill through /proc")
def test_a_killed_process_is_replaced_and_the_end_is_the_same(
    commanded: tuple[Path, str], tmp_path: Path
) -> None:
    words = ("-m", "mimbench", "pretrain", "--method", "mae", "--set", "recipe.checkpoint_minutes=0", *WORDS)
    started = torchrun(tmp_path, *words, options=("--max-restarts", "1"))
    try:
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob("cache/pretrain/mae/*/step-*[5-9]")):
            assert started.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        killed = rank_one(tmp_path)
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
    except BaseException:
        started.kill()
        raise
    ended(started)
    ours, history = weights(tmp_path / "cache", "mae")
    theirs, undisturbed = weights(commanded[0] / "cache", "mae")
    assert (history["resumed"], undisturbed["resumed"]) == (1, 0)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert history["curve"] == undisturbed["curve"]
