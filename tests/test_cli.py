"""The command as its user meets it: what it prints, how it ends, and what is left when something goes wrong."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

from mimbench import cli, paths, record, runner

TINY = (
    "--set image_size=16 --set backbone.width=16 --set backbone.depth=1 --set backbone.heads=1"
    " --set decoder.width=16 --set decoder.depth=1 --set decoder.heads=1 --set recipe.epochs=1"
)
FLOOR = "--set image_size=16 --set vit.width=16 --set vit.depth=1 --set vit.heads=1"
FLOOR_RUN = f"run -q --method random_init --protocol knn {FLOOR} --preset smoke"


@dataclass
class Ended:
    code: int
    out: str
    err: str


Command = Callable[[str], Ended]


def call(line: str, capture: Callable[[], tuple[str, str]]) -> Ended:
    """Runs ``mimbench LINE`` in this process; an exception that the command does not handle fails the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mimbench", *shlex.split(line)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    out, err = capture()
    return Ended(int(ended.value.code or 0), out, err)


@pytest.fixture
def mimbench(capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda line: call(line, capsys.readouterr)


@pytest.fixture
def fails(mimbench: Command) -> Callable[..., str]:
    """Runs a command that must end with one line on stderr, and nothing else, and exit code 2; gives the line."""

    def run(line: str, *expected: str) -> str:
        ended = mimbench(line)
        assert ended.code == 2
        assert not ended.out
        assert ended.err.startswith("error: ")
        assert ended.err.count("\n") == 1, ended.err
        for text in expected:
            assert text in ended.err
        return ended.err

    return run


@pytest.fixture(scope="module")
def floor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with two records: random_init by knn under seeds 0 and 1."""
    top = tmp_path_factory.mktemp("floor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIMBENCH_CACHE", str(top / "cache"))
        patch.setenv("MIMBENCH_RESULTS", str(top / "results"))
        assert call(f"{FLOOR_RUN} --seeds 2", lambda: ("", "")).code == 0
    return top / "results"


@pytest.fixture
def results(floor: Path) -> Path:
    """The test's own results folder, with the records of ``floor`` in it."""
    return Path(shutil.copytree(floor, paths.results()))


def start(line: str) -> subprocess.Popen[str]:
    """``mimbench LINE`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mimbench", *shlex.split(line)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


# Start


@pytest.mark.parametrize("line", ["--help", "run --help", "list methods", "list protocols", "list datasets"])
def test_nothing_heavy_is_imported_to_look_around(line: str) -> None:
    heavy = ["torch", "torchvision", "timm", "numpy", "scipy", "pandas", "duckdb", "jinja2", "pyarrow"]
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('heavy:', [m for m in {heavy} if m in sys.modules]))\n"
        "from mimbench.cli import main\n"
        f"sys.argv = ['mimbench', *{shlex.split(line)}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 3
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_a_reader_that_leaves_early_is_no_fault() -> None:
    code = f"{shlex.quote(sys.executable)} -m mimbench list methods | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.stderr == ""


# Runs


def test_a_run_says_what_it_found_and_how_to_repeat_it(mimbench: Command) -> None:
    first = mimbench(f"run --method random_init --protocol knn:solo {FLOOR} --seed 7")
    assert first.code == 0
    (made,), faults = record.scan(paths.results())
    assert not faults
    score = made.metrics["top1"]
    assert f"{score.value:.2f} [{score.low:.2f}, {score.high:.2f}]" in first.out
    assert made.command in first.out
    assert "evaluating random_init by knn:solo on digits" in first.err

    again = mimbench(made.command.removeprefix("mimbench "))
    assert again.code == 0
    assert "recorded before" in again.out
    assert "recorded before" not in mimbench(f"{made.command.removeprefix('mimbench ')} --force -q").out


def test_json_is_all_there_is_on_standard_output(mimbench: Command, results: Path) -> None:
    for line in (f"{FLOOR_RUN} --seeds 2 --json", "list runs --json"):
        ended = mimbench(line)
        assert (ended.code, ended.err) == (0, "")
        assert {made["seed"] for made in json.loads(ended.out)} == {0, 1}
    count = mimbench("query --json 'select count(*) as runs from runs'")
    assert json.loads(count.out) == [{"runs": 2}]
    slugs = json.loads(mimbench("list methods --json").out)
    assert set(slugs) == {file.parent.name for file in paths.methods().glob("*/method.toml")}


def test_show_gives_a_run_by_the_beginning_of_its_id_and_a_method(mimbench: Command, results: Path) -> None:
    made = record.scan(results)[0][0]
    assert json.loads(mimbench(f"show {made.id[:8]}").out)["id"] == made.id
    card = json.loads(mimbench("show mae").out)
    assert card["presets"]["paper"]["mask_ratio"] == 0.75
    assert card["presets"]["smoke"]["image_size"] == 32


def test_two_runs_at_once_both_end_up_in_the_database(mimbench: Command) -> None:
    running = [start(f"{FLOOR_RUN} --seed {seed}") for seed in (0, 1)]
    for process in running:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert not err
    ended = mimbench("query --json 'select seed from runs order by seed'")
    assert json.loads(ended.out) == [{"seed": 0}, {"seed": 1}]


# Interruptions

LONG = f"--method mae {TINY} --set recipe.epochs=8 --seed 1"
SAVING = f"pretrain {LONG} --set recipe.checkpoint_minutes=0"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], record.Record]:
    """Weights and record of a run that nothing disturbed."""
    top = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIMBENCH_CACHE", str(top / "cache"))
        patch.setenv("MIMBENCH_RESULTS", str(top / "results"))
        assert call(f"run -q {LONG} --protocol knn", lambda: ("", "")).code == 0
        (made,), _ = record.scan(paths.results())
        return weights(), made


def weights() -> dict[str, torch.Tensor]:
    (file,) = paths.cache().glob("pretrain/mae/*/model.safetensors")
    return safetensors.torch.load_file(file)


def stopped_midway(how: signal.Signals) -> tuple[int, str, str]:
    """Starts the pretraining, sends it ``how`` after some steps, and gives exit code, stdout and stderr."""
    process = start(SAVING)
    deadline = time.monotonic() + 60
    while not list(paths.cache().glob("pretrain/mae/*/step-*5")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    (folder,) = paths.cache().glob("pretrain/mae/*")
    assert list(folder.glob("step-*")), "nothing was saved"
    assert not (folder / "history.json").exists(), "it had finished already"
    return process.returncode, out, err


def test_a_budget_replaces_the_epochs_and_its_command_repeats_it(mimbench: Command) -> None:
    line = f"run --method mae --protocol knn {TINY} --budget 640img --json -q"
    (found,) = json.loads(mimbench(line).out)
    assert (found["pretrain"]["images"], found["pretrain"]["steps"]) == (
        640,
        640 // found["config"]["recipe"]["batch_size"],
    )
    again = mimbench(found["command"].removeprefix("mimbench ") + " --json -q")
    assert json.loads(again.out)[0]["id"] == found["id"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_pretraining_goes_on_and_ends_as_an_uninterrupted_one(
    how: signal.Signals,
    mimbench: Command,
    results: Path,
    uninterrupted: tuple[dict[str, torch.Tensor], record.Record],
) -> None:
    before = {file: file.read_bytes() for file in record.files(results)}
    code, out, err = stopped_midway(how)
    if how is signal.SIGINT:
        assert code == 130
        assert not out
        assert err.splitlines()[-1].startswith("error: interrupted. ")
        assert err.count("error") == 1
        assert "Traceback" not in err
    assert {file: file.read_bytes() for file in record.files(results)} == before

    assert mimbench(f"run -q {LONG} --protocol knn").code == 0
    expected, theirs = uninterrupted
    found = weights()
    assert found.keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in found.items())
    ours = next(made for made in record.scan(results)[0] if made.method.slug == "mae")
    assert ours.metrics == theirs.metrics
    assert ours.details == theirs.details
    assert ours.curve == theirs.curve
    assert ours.pretrain.resumed == 1
    assert theirs.pretrain.resumed == 0


def test_ctrl_c_outside_of_training(mimbench: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    ended = mimbench(FLOOR_RUN)
    assert ended.code == 130
    assert ended.err.strip().startswith("error: interrupted")
    assert len(ended.err.strip().splitlines()) == 1


# Names and settings


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("run --method maee --protocol knn", "unknown method 'maee'. Did you mean mae"),
        ("run --method mae --protocol knnn", "unknown protocol 'knnn'. Did you mean knn?"),
        ("run --method mae --protocol linear:dinoo", "unknown recipe of linear 'dinoo'. Did you mean dino?"),
        ("run --method mae --protocol knn --preset smok", "preset of mae 'smok'. Did you mean smoke?"),
        ("run --method mae --protocol knn --dataset digit", "data set 'digit'. Did you mean digits"),
        ("run --method mae --protocol knn --set mask_ration=0.5", "'mask_ration'. Did you mean mask_ratio?"),
        (
            "run --method mae --protocol knn --set recipe.epoch=1",
            "unknown setting of recipe 'epoch'. Did you mean epochs",
        ),
        ("run --method mae --protocol knn --set knn.temprature=1", "Did you mean temperature?"),
        (
            "run --method mae --protocol knn --set recipe.epochs=many",
            "recipe.epochs = 'many' should be of type",
        ),
        (
            "run --method mae --protocol knn --set recipe.epochs=true",
            "recipe.epochs = True should be of type",
        ),
        ("run --method mae --protocol knn --set recipe.batch_size=1.5", "recipe.batch_size = 1.5"),
        ("run --method mae --protocol knn --set recipe.optimizer=adam", "not one of 'adamw', 'sgd', 'lars'"),
        ("run --method mae --protocol knn --set recipe=3", "recipe = 3 should be"),
        ("run --method mae --protocol knn --set crop_scale=[1]", "crop_scale = [1] should have 2 entries"),
        ("run --method mae --protocol knn --set knn.ks=5", "knn.ks = 5 should be a list"),
        ("run --method mae --protocol knn --set knn=5", "Write knn.KEY=VALUE"),
        ("run --method mae --protocol knn --set knn.recipe=solo", "Write --protocol knn:solo"),
        ("run --method mae --protocol knn --set linear.c_steps=5", "'linear'"),
        ("run --method mae --protocol knn --set recipe.epochs", "key=value"),
        ("run --method mae --protocol knn --set recipe.epochs=-1", "should be 0 or more"),
        ("run --method mae --protocol knn --set recipe.base_lr=-1", "should be 0 or more"),
        ("run --method mae --protocol knn --set crop_scale=[2.0,3.0]", "a crop of [2.0, 3.0]"),
        (
            "run --method mae --protocol knn --set recipe.clip_norm=-1",
            "recipe.clip_norm = -1.0 should be above 0",
        ),
        ("run --method mae --protocol knn --set knn.ks=[]", "knn.ks is an empty list"),
        (
            "run --method mae --protocol linear --set linear.eval_crop=0",
            "linear.eval_crop = 0.0 should be above 0",
        ),
        ("run --method mae --protocol linear --set linear.c_powers=[-400.0,400.0]", "linear.c_powers"),
        ("run --method mae --protocol finetune --set finetune.training.batch_size=0", "batch_size = 0"),
        (
            "run --method mae --protocol segmentation --set segmentation.penalties=[]",
            "penalties is an empty list",
        ),
        ("run --method mae --protocol segmentation --set segmentation.bank=-4", "segmentation.bank = -4"),
        ("run --method simsiam --protocol knn --set recipe.batch_size=1", "recipe.batch_size = 1"),
        ("run --method supervised --protocol knn --set classes=3", "classes = 3 are fewer than the 10"),
        (
            "run --method mae --protocol knn --set recipe.batch_size=0",
            "recipe.batch_size = 0 should be above 0",
        ),
        ("run --method mae --protocol knn --set backbone.heads=3", "3 heads"),
        ("run --method mae --protocol knn --set backbone.heads=0", "0 heads"),
        ("run --method mae --protocol knn --set decoder.heads=3", "3 heads"),
        ("run --method mae --protocol knn --set backbone.patch_size=0", "patch_size=0"),
        ("run --method mae --protocol knn --set image_size=30", "not a multiple of the patch size 4"),
        ("run --method mae --protocol knn --set mask_ratio=1.5", "mask_ratio = 1.5"),
        ("run --method mae --protocol knn --device gpu", "'gpu' is not a device"),
        ("run --method , --protocol knn", "empty list of names"),
        ("run --method mae", "--protocol"),
        ("run --method mae --protocol knn --seeds 0", "--seeds"),
        ("run --method mae --protocol knn --budget 90", "budget '90' is neither"),
        ("run --method mae --protocol knn --budget 2w", "budget '2w' is neither"),
        ("run --method mae --protocol knn --sed 0", "--seed"),
        ("frobnicate", "No such command 'frobnicate'"),
        (f"evaluate --method mae --protocol knn {TINY}", "Run 'mimbench pretrain'"),
        ("pretrain --method maee", "unknown method 'maee'"),
        ("show maa", "unknown run or method 'maa'. Did you mean mae"),
        ("picture random_init --out x.png", "trains nothing"),
        ("picture mae --out x.jpg", "does not end in .png"),
        ("picture mae --preset smol --out x.png", "Did you mean smoke?"),
        ("new method Bad-Slug --title T --arxiv 2101.00001", "not a valid slug"),
        ("new method mae --title T --arxiv 2101.00001", "exists already"),
        ("new method demo --title T --arxiv 2101", "not an arXiv id"),
        ("data get camvi", "Did you mean camvid"),
        ("query 'drop table runs'", "for reading only"),
        ("query 'selec 1'", "syntax error"),
        ("query 'select 1; drop table runs'", "one select statement"),
        ("query 'select * from run'", "run"),
        ("query ''", "one select statement"),
        ("check", "there are no baselines"),
        ("parity", "--case"),
        ("parity --case nothing.npz", "nothing.npz"),
        ("parity --cases nothing", "there is no folder nothing"),
        ("score nothing.npz", "nothing.npz"),
    ],
)
def test_one_line_says_what_is_wrong(line: str, expected: str, fails: Callable[..., str]) -> None:
    fails(line, expected)
    assert not record.files(paths.results())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(fails: Callable[..., str]) -> None:
    fails(f"{FLOOR_RUN} --device cuda", "no usable GPU", "--device cpu")


# Data


def jpeg(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), shade, np.uint8)).save(stream, "jpeg")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of two classes in folders, ten each for training and two for testing."""
    top = tmp_path / "images"
    for part, count in (("train", 10), ("test", 2)):
        for number, name in enumerate(("dark", "light")):
            place = top / part / name
            place.mkdir(parents=True)
            for image in range(count):
                (place / f"{image}.jpg").write_bytes(jpeg(200 * number + image))
    return top


def on(place: str) -> str:
    return f"{FLOOR_RUN} --set knn.ks=[3] --dataset {shlex.quote(place)}"


def test_images_in_folders_are_scored(folder: Path, mimbench: Command) -> None:
    ended = mimbench(on(f"imagefolder:{folder}"))
    assert (ended.code, ended.err) == (0, "")
    assert "100.00 [" in ended.out


def test_missing_data_say_where_to_get_them_and_where_to_put_them(
    fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIMBENCH_DATA", str(tmp_path / "mine"))
    fails(on("camvid"), "Get it from https://", f"put it into {tmp_path / 'mine'} as camvid/train-*.parquet")
    monkeypatch.delenv("MIMBENCH_DATA")
    fails(on("imagenet"), "Get it from https://", "imagenet/train/")


def test_a_corrupt_image_is_named(folder: Path, fails: Callable[..., str]) -> None:
    bad = folder / "train" / "dark" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    fails(on(f"imagefolder:{folder}"), "dark/3.jpg")


def test_a_truncated_parquet_is_named(tmp_path: Path, fails: Callable[..., str]) -> None:
    file = tmp_path / "x.parquet"
    images = [{"bytes": jpeg(shade), "path": ""} for shade in range(20)]
    pq.write_table(pa.table({"image": images, "label": [0, 1] * 10}), file)
    file.write_bytes(file.read_bytes()[:-20])
    fails(on(f"parquet:{file}"), "x.parquet cannot be read")


def test_data_without_labels_for_what_needs_them(folder: Path, fails: Callable[..., str]) -> None:
    for part in ("train", "test"):
        for image in list((folder / part).rglob("*.jpg")):
            image.rename(folder / part / f"{image.parent.name}{image.name}")
        for name in ("dark", "light"):
            (folder / part / name).rmdir()
    fails(on(f"imagefolder:{folder}"), "knn needs labels, which", "--eval-dataset")
    fails(f"pretrain --method supervised --preset smoke --dataset imagefolder:{folder}", "needs labels")


# Training and its cache

TRAIN = f"-q --method mae {TINY}"


def test_a_loss_that_is_not_finite_names_its_step(fails: Callable[..., str]) -> None:
    line = f"run {TRAIN} --protocol knn --set recipe.base_lr=1e30 --set recipe.warmup_epochs=0"
    said = fails(line, "the loss of pretraining mae became", "at step", "a lower recipe.base_lr")
    assert "no checkpoint had been saved" in said
    # Saved every step, the last one before the fault stays and the next attempt meets the same.
    said = fails(f"{line} --set recipe.checkpoint_minutes=0", "the last good checkpoint is")
    kept = said.partition("the last good checkpoint is ")[2].partition(". ")[0]
    assert (Path(kept) / "model.safetensors").is_file()
    assert fails(f"{line} --set recipe.checkpoint_minutes=0") == said


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("cut", "model.safetensors cannot be read"),
        ("shape", "does not fit the model: it has another shape for backbone.cls_token (1, 1, 8)"),
        ("names", "it lacks backbone.cls_token; it has unexpected cls"),
    ],
)
def test_damaged_weights_in_the_cache_are_named(
    damage: str, expected: str, mimbench: Command, fails: Callable[..., str], results: Path
) -> None:
    assert mimbench(f"pretrain {TRAIN}").code == 0
    (file,) = paths.cache().glob("pretrain/mae/*/model.safetensors")
    tensors = safetensors.torch.load_file(file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        token = tensors.pop("backbone.cls_token")
        tensors["cls" if damage == "names" else "backbone.cls_token"] = token[..., :8].contiguous()
        safetensors.torch.save_file(tensors, file)
    before = record.files(results)
    fails(f"run {TRAIN} --protocol knn", expected, str(file))
    assert record.files(results) == before


def test_a_cache_that_cannot_be_written(
    fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MIMBENCH_CACHE", str(tmp_path / "file" / "cache"))
    fails(FLOOR_RUN, str(tmp_path / "file" / "cache"), "Set MIMBENCH_CACHE")


def test_memory_that_does_not_suffice(fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(runner, "run", exhausted)
    fails(FLOOR_RUN, "ran out of memory", "recipe.batch_size")


# Results


def test_results_that_cannot_be_written_are_kept_elsewhere(
    mimbench: Command, fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    good = os.environ["MIMBENCH_RESULTS"]
    monkeypatch.setenv("MIMBENCH_RESULTS", str(tmp_path / "file" / "results"))
    said = fails(FLOOR_RUN, "cannot be written", "Set MIMBENCH_RESULTS")
    kept = said.partition("The record is kept in ")[2].partition(".json")[0] + ".json"
    assert json.loads(Path(kept).read_text())["method"]["slug"] == "random_init"
    monkeypatch.setenv("MIMBENCH_RESULTS", good)
    assert mimbench(FLOOR_RUN).code == 0
    assert [file.name for file in record.files(Path(good))] == [Path(kept).name]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_results_folder(results: Path, fails: Callable[..., str]) -> None:
    before = record.files(results)
    for place in [results, *(p for p in results.rglob("*") if p.is_dir())]:
        place.chmod(0o500)
    fails(f"{FLOOR_RUN} --force", "cannot be written", "The record is kept in")
    assert record.files(results) == before


def test_a_broken_record_does_not_hide_the_others(mimbench: Command, results: Path) -> None:
    bad, good = record.files(results)
    text = bad.read_text()
    for damage in (text[:200], text.replace('"seed": ', '"seed": 1'), "", "[]"):
        bad.write_text(damage)
        shown = mimbench("list runs")
        assert shown.code == 0
        assert good.stem in shown.out
        assert bad.stem not in shown.out
        assert str(bad) in shown.err
        assert shown.err.startswith("warning: ")
        assert shown.err.count("\n") == 1
        counted = mimbench("query --json 'select id from runs'")
        assert json.loads(counted.out) == [{"id": good.stem}]
        assert str(bad) in counted.err
        page = mimbench(f"report --out {results.parent / 'site'}")
        assert page.code == 0
    assert good.is_file()
    assert mimbench(f"{FLOOR_RUN} --seeds 2").code == 0
    assert mimbench("list runs").err == ""


def test_a_report_without_records_is_a_page(mimbench: Command, tmp_path: Path) -> None:
    ended = mimbench(f"report --out {tmp_path / 'site'}")
    assert (ended.code, ended.err) == (0, "")
    assert Path(ended.out.strip()).is_file()


def test_the_front_page_is_written_as_one_file(
    mimbench: Command, fails: Callable[..., str], tmp_path: Path
) -> None:
    ended = mimbench(f"report --single-file {tmp_path / 'page.html'}")
    assert (ended.code, ended.out.strip(), ended.err) == (0, str(tmp_path / "page.html"), "")
    assert [f.name for f in tmp_path.rglob("*.html")] == ["page.html"]
    fails(f"report --single-file {tmp_path / 'page.html'} --out {tmp_path}", "--single-file")


def test_the_check_fails_when_a_metric_has_left_its_interval(mimbench: Command, results: Path) -> None:
    written = mimbench("check --update")
    assert written.code == 0
    (file,) = (results / "baselines").glob("*.json")
    assert str(file) in written.out
    passed = mimbench("check")
    assert (passed.code, passed.err) == (0, "")
    assert "ok" in passed.out

    baseline = json.loads(file.read_text())
    baseline |= {"low": 99.5, "high": 99.9}
    file.write_text(json.dumps(baseline))
    failed = mimbench("check")
    assert (failed.code, failed.err) == (1, "")
    for text in ("FAILED", "random_init", "knn:dino", "top1", "99.50 to 99.90", "outside the interval"):
        assert text in failed.out
    rows = json.loads(mimbench("check --json").out)
    assert [row["status"] for row in rows] == ["failed"]

    shutil.rmtree(results / "runs")
    missing = mimbench("check")
    assert missing.code == 1
    assert "no record for seed 0, 1" in missing.out

    file.write_text("{")
    broken = mimbench("check")
    assert broken.code == 2
    assert file.name in broken.err


# Golden vectors, features and pictures


@pytest.mark.parametrize(
    ("array", "text", "expected"),
    [
        (b"PK damaged", "{}", "case.json lacks slug, config, arrays"),
        (b"PK damaged", '{"slug": "mae"', "case.json cannot be read"),
        (b"PK damaged", '{"slug": "mae", "config": {}, "arrays": {}}', "case.npz cannot be read"),
        (b"", '{"slug": "mae", "config": {}, "arrays": {}}', "case.npz cannot be read"),
        (None, '{"slug": "maee", "config": {}, "arrays": {}}', "unknown method 'maee'"),
        (None, '{"slug": "mae", "config": {}, "arrays": {"pred": {}}}', "case.npz lacks pred"),
        (None, '{"slug": "mae", "config": {}, "arrays": {"loss": {}}}', "the config of "),
    ],
)
def test_a_damaged_case_is_named(
    array: bytes | None, text: str, expected: str, tmp_path: Path, fails: Callable[..., str]
) -> None:
    file = tmp_path / "case.npz"
    np.savez(file, loss=np.float32(1), grad_norm=np.float32(1))
    if array is not None:
        file.write_bytes(array)
    file.with_suffix(".json").write_text(text)
    fails(f"parity --case {file}", expected)


def test_features_that_cannot_be_scored(tmp_path: Path, fails: Callable[..., str]) -> None:
    file = tmp_path / "x.npz"
    file.write_bytes(b"no archive")
    fails(f"score {file}", "x.npz")
    features, labels = np.eye(4, dtype=np.float32), np.arange(4)
    np.savez(file, train=features, train_labels=labels, test=features)
    fails(f"score {file}", "test_labels")
    np.savez(file, train=features * np.nan, train_labels=labels, test=features, test_labels=labels)
    fails(f"score {file}", "x.npz")
    np.savez(file, train=features, train_labels=labels, test=features, test_labels=labels)
    fails(f"score {file} --protocol knnn", "knnn")


def test_features_are_scored(tmp_path: Path, mimbench: Command) -> None:
    file = tmp_path / "x.npz"
    features, labels = np.eye(4, dtype=np.float32).repeat(5, 0), np.arange(4).repeat(5)
    np.savez(file, train=features, train_labels=labels, test=features, test_labels=labels)
    ended = mimbench(f"score {file} --protocol knn:solo --set knn.ks=[3] -q")
    assert (ended.code, ended.err) == (0, "")
    assert "100.00" in ended.out


def test_a_picture_goes_where_it_should(mimbench: Command, fails: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "new" / "mae.png"
    assert mimbench(f"picture mae --out {file}").out.strip() == str(file)
    with Image.open(file) as drawn:
        assert drawn.format == "PNG"
    (tmp_path / "file").touch()
    fails(f"picture mae --out {tmp_path / 'file' / 'mae.png'}", "cannot be written")


def test_every_reported_number_has_a_verdict(mimbench: Command, fails: Callable[..., str]) -> None:
    ended = mimbench("verdicts")
    assert (ended.code, ended.err) == (0, "")
    assert "the method is not here yet" in ended.out
    assert "imagenet-1k" not in ended.out, "what cannot be tested is counted, not listed"
    listed = mimbench("verdicts simsiam")
    assert "91.8 %" in listed.out
    content = json.loads(mimbench("verdicts simsiam --json").out)
    found = content["verdicts"]
    assert content["margins"] == 1
    counted = [int(line.split()[0]) for line in listed.out.splitlines() if line[:1].isdigit()]
    assert sum(counted) == len(found) > 0
    assert {row["reason"] for row in found} == {"run", "protocol"}
    assert all("simsiam" in (row["slug"], row["method"]) for row in found)
    fails("verdicts simsia", "Did you mean simsiam")


def test_doctor_says_where_things_are(mimbench: Command, tmp_path: Path) -> None:
    ended = mimbench("doctor")
    assert ended.code == 0
    for place in (paths.cache(), paths.results()):
        assert str(place) in ended.out
