"""What the pages say can be done: their files are read, their scripts are sound, their commands and options exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import click
import pytest
import typer

from mimbench import cli
from mimbench.sweep import cluster, file

TOP = Path(__file__).parents[1]
PAGES = [
    *(TOP / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((TOP / "docs").glob("*.md")),
]
CLUSTER = TOP / "docs" / "cluster.md"


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language; "" for those without one."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [body for name, body in found if name == language]


def test_the_sweep_of_the_page_is_read_and_names_every_key(tmp_path: Path) -> None:
    (text,) = blocks(CLUSTER, "toml")
    place = tmp_path / "sweep.toml"
    place.write_text(text, encoding="utf-8")
    sweep = file.read(place, "cuda")
    assert sweep.name == "ablation"
    assert sweep.resources_of("evaluate", "linear") == file.Resources(cpus=2, gpus=0.25)
    cases, left_out = file.cases(sweep.runs[0])
    assert {case.method for case in cases} == {"mae", "simmim"}
    assert {case.preset for case in cases} == {"cifar"}
    assert "timm" in {each.what for each in left_out}
    assert {case.preset for case in file.cases(file.read(place, "cpu").runs[0])[0]} == {"laptop"}
    for kind in (file.Sweep, file.Runs, file.Resources):
        for each in fields(kind):
            assert re.search(rf"\b{each.name}\b", text), f"{each.name} of {kind.__name__} is not on the page"


def test_scripts_are_sound() -> None:
    if (bash := shutil.which("bash")) is None:
        pytest.skip("no bash")
    scripts = [body for page in PAGES for body in blocks(page, "bash")]
    assert sum("#SBATCH" in script for script in scripts) == 3
    for script in scripts:
        done = subprocess.run([bash, "-n"], input=script, capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr


def test_the_manifest_is_one_whose_volumes_and_commands_are_there() -> None:
    yaml = pytest.importorskip("yaml")
    (text,) = blocks(CLUSTER, "yaml")
    made = yaml.safe_load(text)
    assert (made["apiVersion"], made["kind"]) == ("ray.io/v1", "RayJob")
    cluster_spec = made["spec"]["rayClusterSpec"]
    (image,) = blocks(CLUSTER, "dockerfile")
    assert f"rayproject/ray:{cluster_spec['rayVersion']}-" in image
    assert f"ray=={cluster_spec['rayVersion']}\n" in (TOP / "constraints.txt").read_text(encoding="utf-8")
    for group in (cluster_spec["headGroupSpec"], *cluster_spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {each["name"] for each in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
            assert set(mounts) == volumes
            for variable in container["env"]:
                assert any(variable["value"].startswith(place) for place in mounts.values()), variable


def commands() -> list[tuple[str, list[str]]]:
    """Every call of mimbench in a code block, as the page and the words after "mimbench"."""
    found = []
    for page in PAGES:
        text = "\n".join(body for kind in ("", "bash", "yaml") for body in blocks(page, kind))
        for line in text.replace("\\\n", " ").splitlines():
            for call in re.findall(r"(?:^|[ ;])mimbench (?=[a-z])([^#|]*)", line.strip()):
                words = shlex.split(call.rstrip("& "))
                found.append((page.name, words))
    return found


def test_commands_and_their_options_exist() -> None:
    top = typer.main.get_command(cli.app)
    found = commands()
    assert {page for page, _ in found} == {"README.md", "CONTRIBUTING.md", "cluster.md"}
    for page, words in found:
        command: click.Command = top
        while isinstance(getattr(command, "commands", None), dict) and words[0] in command.commands:
            command = command.commands[words[0]]
            words = words[1:]
        assert command is not top, f"{page}: mimbench {words[0]}"
        known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        for word in words:
            if word.startswith("-"):
                assert word.partition("=")[0] in known, f"{page}: {word} of {command.name}"


def test_the_limit_of_weights_is_the_one_that_the_page_gives() -> None:
    assert f"weights may be {cluster.MOST // 2**30} GiB" in CLUSTER.read_text(encoding="utf-8")


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_test_that_a_promise_names_is_there() -> None:
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (TOP / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    for test_file, test in named:
        assert re.search(rf"^def {test}\(", (TOP / test_file).read_text(encoding="utf-8"), re.MULTILINE), test
