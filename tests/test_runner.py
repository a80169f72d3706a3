"""From requests to records: what is trained, what is skipped, what is repeated, and that it repeats exactly."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mimbench import checkpoint, config, data, fit, paths, progress, record, registry, runner, seeds
from mimbench.errors import ConfigError, DataError, MimbenchError, UnknownName
from mimbench.models import vq
from mimbench.runner import Outcome, Request

TINY = (
    "image_size=16",
    "backbone.width=16",
    "backbone.depth=1",
    "backbone.heads=1",
    "decoder.width=16",
    "decoder.depth=1",
    "decoder.heads=1",
    "recipe.epochs=1",
)
FLOOR = ("image_size=16", "vit.width=16", "vit.depth=1", "vit.heads=1")


def run(
    methods: str = "mae", protocols: str = "knn", overrides: tuple[str, ...] = TINY, **more: Any
) -> list[Outcome]:
    request = Request(tuple(methods.split(",")), tuple(protocols.split(",")), overrides=overrides, **more)
    return list(runner.run(request, progress.quiet()))


def values(outcome: Outcome) -> dict[str, Any]:
    """All of a record that the same command must give again."""
    made = dataclasses.asdict(outcome.record)
    for name in ("created", "seconds", "environment", "git", "test_reads"):
        del made[name]
    for name in ("seconds", "device_seconds", "peak_memory", "resumed"):
        del made["pretrain"][name]
    return made


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(name, seed) of each pretraining that ``runner`` starts; one that is found complete does not count."""
    calls: list[tuple[str, int]] = []

    def counting(*args: Any, **kwargs: Any) -> fit.History:
        if not (kwargs["folder"] / "history.json").exists():
            calls.append((kwargs["name"], kwargs["seed"]))
        return fit.fit(*args, **kwargs)

    monkeypatch.setattr(runner, "fit", counting)
    return calls


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> dict[str, registry.Card]:
    """Cards that a test may replace; the real ones come back."""
    found = dict(registry.methods())
    monkeypatch.setattr(registry, "methods", lambda: found)
    return found


def test_the_same_command_twice_gives_the_same_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocols = "linear,knn,finetune"
    overrides = (*TINY, "finetune.least_steps=3", "finetune.training.epochs=0.1", "linear.c_steps=5")
    words = ["--method", "mae", "--protocol", protocols, "--quiet", "--json"]
    for item in overrides:
        words += ["--set", item]
    monkeypatch.setenv("MIMBENCH_CACHE", str(tmp_path / "other cache"))
    monkeypatch.setenv("MIMBENCH_RESULTS", str(tmp_path / "other results"))
    done = subprocess.run(
        [sys.executable, "-m", "mimbench", "run", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("MIMBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MIMBENCH_RESULTS", str(tmp_path / "results"))
    ours = run(protocols=protocols, overrides=overrides)
    assert all(outcome.repeated for outcome in ours)
    elsewhere, _ = record.scan(tmp_path / "other results")
    theirs = {made.protocol.name: values(Outcome(made, None, True)) for made in elsewhere}
    assert {o.record.protocol.name: values(o) for o in ours} == theirs
    assert {made["id"] for made in json.loads(done.stdout)} == {o.record.id for o in ours}
    # Numbers that never move would pass all of the above.
    moved = run(overrides=overrides[:-3], seeds=(1,))[0].record
    assert moved.metrics != next(o.record.metrics for o in ours if o.record.protocol.name == "knn")


def test_one_pretraining_serves_all_protocols_and_runs_are_done_once(trained: list[Any]) -> None:
    first = run(protocols="knn,linear:cached", overrides=(*TINY, "linear.c_steps=3"), seeds=(3, 4))
    assert trained == [("pretraining mae", 3), ("pretraining mae", 4)]
    assert [(o.record.protocol.name, o.record.seed) for o in first] == [
        ("knn", 3),
        ("linear", 3),
        ("knn", 4),
        ("linear", 4),
    ]
    assert all(o.repeated and o.file and o.file.is_file() for o in first)
    assert len({o.record.pretrain.key for o in first}) == 2

    texts = [o.file.read_text() for o in first if o.file]
    again = run(protocols="knn,linear:cached", overrides=(*TINY, "linear.c_steps=3"), seeds=(3, 4))
    assert not any(o.repeated for o in again)
    assert [o.record for o in again] == [o.record for o in first]
    assert [o.file.read_text() for o in again if o.file] == texts

    other = run(protocols="knn:solo", seeds=(3,))
    assert other[0].repeated
    assert other[0].record.pretrain.key == first[0].record.pretrain.key
    assert len(trained) == 2


def test_force_repeats_the_evaluation_and_gives_the_same(trained: list[Any]) -> None:
    (first,) = run()
    (again,) = run(force=True)
    assert again.repeated
    assert values(again) == values(first)
    assert (first.record.test_reads, again.record.test_reads) == (1, 2)
    assert len(trained) == 1
    assert len(record.files(paths.results())) == 1


def test_a_recorded_command_repeats_just_its_run() -> None:
    overrides = (*TINY, "linear.c_steps=3", "knn.temperature=0.1")
    for outcome in run(protocols="knn:solo,linear", overrides=overrides, seeds=(5,)):
        words = outcome.record.command.split()
        request = Request(
            methods=(words[words.index("--method") + 1],),
            protocols=(words[words.index("--protocol") + 1],),
            dataset=words[words.index("--dataset") + 1],
            preset=words[words.index("--preset") + 1],
            seeds=(int(words[words.index("--seed") + 1]),),
            overrides=tuple(words[n + 1] for n, word in enumerate(words) if word == "--set"),
        )
        (again,) = runner.run(request, progress.quiet())
        assert not again.repeated
        assert again.record == outcome.record


def test_evaluate_alone_needs_the_pretraining(trained: list[Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"mae, seed 0, has not been pretrained on 'digits'.*mimbench pretrain"
    ):
        run(may_pretrain=False)
    (found,) = runner.pretrain_all(Request(("mae",), overrides=TINY), progress.quiet())
    assert trained == [("pretraining mae", 0)]
    (outcome,) = run(may_pretrain=False)
    assert outcome.record.pretrain.key == found.key
    assert len(trained) == 1


def test_code_settings_or_data_that_changed_repeat_a_run(
    monkeypatch: pytest.MonkeyPatch, cards: dict[str, registry.Card]
) -> None:
    def repeated() -> bool:
        (outcome,) = run("random_init", overrides=FLOOR)
        return outcome.repeated

    assert repeated()
    assert not repeated()
    code = record.protocol_code
    monkeypatch.setattr(record, "protocol_code", lambda name: code(name) + "x")
    assert repeated()
    assert not repeated()

    card = cards["random_init"]
    presets = card.presets | {"smoke": card.presets["smoke"] | {"pool": "class"}}
    cards["random_init"] = dataclasses.replace(card, presets=presets)
    assert repeated(), "an edited preset was taken for the recorded one"
    assert not repeated()

    load = data.load

    def other_data(place: str, *more: Any) -> data.Dataset:
        found = load(place, *more)
        return dataclasses.replace(found, train=dataclasses.replace(found.train, fingerprint="other"))

    monkeypatch.setattr(data, "load", other_data)
    assert repeated()
    assert not repeated()


def test_a_damaged_record_is_made_again() -> None:
    (first,) = run("random_init", overrides=FLOOR)
    assert first.file
    first.file.write_text(first.file.read_text()[:100])
    (again,) = run("random_init", overrides=FLOOR)
    assert again.repeated
    assert values(again) == values(first)
    assert again.record.test_reads == 2


def test_reads_of_the_test_labels_add_up_over_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    def reads(protocol: str, **more: Any) -> int:
        (outcome,) = run("random_init", protocol, FLOOR, **more)
        assert outcome.record == record.read(outcome.file or Path())
        return outcome.record.test_reads

    assert reads("knn:dino_official") == 4
    assert reads("knn:dino_official") == 4  # recorded before: nothing is read
    assert reads("knn:dino_official", force=True) == 8
    assert reads("knn:dino") == 1
    code = record.protocol_code
    monkeypatch.setattr(record, "protocol_code", lambda name: code(name) + "x")
    assert reads("knn:dino_official") == 12


@pytest.mark.parametrize(
    ("asked", "fault", "message"),
    [
        # The second name of each request is at fault; the first would train.
        ({"methods": "mae,maee"}, UnknownName, "mae"),
        ({"protocols": "knn,linea"}, UnknownName, "linear"),
        ({"methods": "mae,random_init"}, UnknownName, "unknown setting 'backbone'"),
        ({"protocols": "knn,linear", "overrides": (*TINY, "linear.c_step=3")}, UnknownName, "c_steps"),
        ({"protocols": "knn,segmentation", "eval_dataset": "digits"}, ConfigError, "needs masks"),
        ({"protocols": "knn", "eval_dataset": "camvid"}, DataError, "Get it from"),
    ],
)
def test_everything_is_checked_before_anything_is_trained(
    asked: dict[str, Any], fault: type[Exception], message: str, trained: list[Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path / "no data"))
    with pytest.raises(fault, match=message):
        run(**asked)
    assert not trained
    assert not record.files(paths.results())


def test_dense_protocols_find_scenes_with_masks_by_themselves() -> None:
    plan = runner._Plan(Request(("random_init",), ("segmentation", "knn")))
    found = runner._targets(plan, data.load("digits"), progress.quiet())
    assert {name: target.name for name, target in found.items()} == {
        "segmentation": "digit-scenes",
        "knn": "digits",
    }


def test_the_pretraining_is_shared_by_what_leaves_the_weights_alone_and_by_nothing_else() -> None:
    plan = runner._Plan(Request(("mae",)))
    dataset = data.load("digits")
    settings = plan.method_settings(plan.methods[0], dataset)
    key = runner.pretraining_key("mae", settings, dataset.train, 0)

    def with_recipe(**changes: Any) -> str:
        changed = dataclasses.replace(settings, recipe=dataclasses.replace(settings.recipe, **changes))
        return runner.pretraining_key("mae", changed, dataset.train, 0)

    assert with_recipe(checkpoint_minutes=1.0) == key
    others = {
        with_recipe(epochs=3.0),
        with_recipe(base_lr=1.0),
        runner.pretraining_key("mae", settings, dataset.train, 1),
        runner.pretraining_key("mae", settings, dataset.test, 0),
        runner.pretraining_key("simmim", settings, dataset.train, 0),
        runner.pretraining_key("mae", dataclasses.replace(settings, flip=True), dataset.train, 0),
    }
    assert len(others | {key}) == 7


def test_the_throughput_step_trains_a_copy() -> None:
    (pretrained,) = runner.pretrain_all(Request(("mae",), overrides=TINY), progress.quiet())
    before = {name: value.clone() for name, value in pretrained.model.state_dict().items()}
    prepare = runner.pretraining_step(pretrained, runner.choose_device("cpu"))
    assert prepare is not None
    step = prepare(8)
    first, later = step(), [step() for _ in range(3)][-1]
    assert later < first
    assert all(value.equal(before[name]) for name, value in pretrained.model.state_dict().items())
    (floor,) = runner.pretrain_all(Request(("random_init",), overrides=FLOOR), progress.quiet())
    assert runner.pretraining_step(floor, runner.choose_device("cpu")) is None


def test_a_method_learns_only_from_data_that_has_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"cropmae with these settings needs frames.*digit-scenes"):
        list(runner.pretrain_all(Request(("cropmae",), overrides=("pairs=frames",)), progress.quiet()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "'gpu' is not a device"),
        ("cpu:1", "no cpu:1 here"),
        ("meta", "not a device that"),
        ("mps", "not a device that"),
        ("", "not a device"),
    ],
)
def test_devices_that_are_none(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        runner.choose_device(name)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nowhere", "there is no teacher 'nowhere'. Write run:SLUG"),
        ("run:dmae", "dmae cannot be its own teacher"),
        ("run:nobody", "nobody"),
    ],
)
def test_a_teacher_that_is_not_there_is_named_before_training(
    reference: str, message: str, trained: list[Any]
) -> None:
    dataset = data.load("digits")
    with pytest.raises(MimbenchError, match=message):
        runner._teacher(
            *(reference, "dmae", dataset, 0, runner.choose_device("cpu"), progress.quiet()), "smoke", True
        )
    assert not trained


def test_a_teacher_is_a_run_with_the_same_preset_data_and_seed_or_a_file(trained: list[Any]) -> None:
    dataset = data.load("digits")
    arguments = (dataset, 3, runner.choose_device("cpu"), progress.quiet())
    reference = " ".join(("run:mae", *TINY))
    first = runner._teacher(reference, "dmae", *arguments, "smoke", True)
    assert trained == [("pretraining mae", 3)]
    assert first.encoder.dim == 16
    assert first.note.startswith(f"the teacher {reference} saw ")
    again = runner._teacher(reference, "dmae", *arguments, "smoke", True)
    assert again.key == first.key
    assert len(trained) == 1
    (folder,) = (paths.cache() / "pretrain" / "mae").iterdir()
    file = runner._teacher(str(folder / "model.safetensors"), "dmae", *arguments, "smoke", True)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(file.encoder(images).patches, first.encoder(images).patches)


def test_a_tokenizer_under_the_same_name_is_another_run_when_its_content_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = data.load("digits")
    module = registry.load_method("cae")
    settings = config.build(module.Config, registry.method("cae").preset("smoke"))
    file = tmp_path / "tokenizer.safetensors"
    settings = dataclasses.replace(settings, tokenizer_weights=str(file))
    monkeypatch.setattr(module, "pretrain", lambda *args, **kwargs: fit.History())
    keys = []
    for seed in (0, 1, 0):
        seeds.seed_everything(seed)
        tokenizer = vq.Tokenizer(settings.tokenizer, 32, 4, flip=False)
        checkpoint.save_tensors(file, tokenizer.state_dict())
        arguments = ("cae", settings, dataset, 0, runner.choose_device("cpu"), progress.quiet())
        keys.append(runner.pretrain(*arguments, preset="smoke").key)
    assert keys[0] == keys[2] != keys[1]
