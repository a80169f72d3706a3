"""Discovery of methods and protocols from their files, and the hash of their code."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from mimbench import paths, registry
from mimbench.errors import ConfigError, MimbenchError, UnknownName

CARD = """
title = "A title"
family = "image-ssl"
protocols = ["knn"]
deviations = ["one"]

[preset.smoke]
image_size = 32
recipe = { epochs = 1 }
"""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """What one test finds is not what the next one sees."""
    registry.methods.cache_clear()
    registry.protocols.cache_clear()
    yield
    registry.methods.cache_clear()
    registry.protocols.cache_clear()


@pytest.fixture
def methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of methods."""
    folder = tmp_path / "methods"
    folder.mkdir()
    monkeypatch.setattr(paths, "methods", lambda: folder)
    return folder


def card(methods: Path, text: str, slug: str = "some") -> Path:
    file = methods / slug / "method.toml"
    file.parent.mkdir()
    file.write_text(text, encoding="utf-8")
    return file


def test_a_folder_with_a_card_is_a_method(methods: Path) -> None:
    card(methods, CARD, "b")
    card(methods, CARD, "a_2")
    (methods / "notes").mkdir()
    found = registry.methods()
    assert list(found) == ["a_2", "b"]
    assert found["b"].protocols == ("knn",)
    assert found["b"].deviations == ("one",)
    assert found["b"].preset("smoke") == {"image_size": 32, "recipe": {"epochs": 1}}
    with pytest.raises(UnknownName, match=r"preset of b 'smokee'\. Did you mean smoke\?"):
        found["b"].preset("smokee")
    with pytest.raises(UnknownName, match=r"unknown method 'bb'"):
        registry.method("bb")
    with pytest.raises(ConfigError, match=r"b has no method\.py"):
        registry.load_method("b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CARD.replace("title", "titel"), r"unknown key in .*method\.toml 'titel'\. Did you mean title\?"),
        (CARD.replace('title = "A title"', ""), r"method\.toml has no 'title'"),
        (CARD.replace('family = "image-ssl"', 'family = ""'), r"method\.toml has no 'family'"),
        (CARD.replace('["knn"]', "[]"), r"method\.toml has no 'protocols'"),
        (CARD.replace('["knn"]', '"knn"'), r"has protocols = 'knn', which should be of type list"),
        (CARD.replace('["one"]', '"one"'), r"has deviations = 'one', which should be of type list"),
        (CARD.replace('"A title"', "3"), r"has title = 3, which should be of type str"),
        ('year = "2022"\n' + CARD, r"has year = '2022', which should be of type int"),
        (CARD.replace("[preset.smoke]", "[preset]"), r"has preset\.image_size = 32, which should be a table"),
        (CARD + "x", r"method\.toml cannot be read: Expected '='"),
    ],
)
def test_a_card_with_a_fault_names_it(text: str, message: str, methods: Path) -> None:
    card(methods, text)
    with pytest.raises(MimbenchError, match=message):
        registry.methods()


@pytest.mark.parametrize("slug", ["Some", "some-thing", "1st"])
def test_a_slug_that_python_cannot_import_is_refused(slug: str, methods: Path) -> None:
    card(methods, CARD, slug)
    with pytest.raises(ConfigError, match="not a valid slug"):
        registry.methods()


def test_a_protocol_is_read_without_being_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '"""What it does.\n\nMore."""\nimport nothing_like_it\nVERSION = 3\nNEEDS = ("masks",)\n'
    (tmp_path / "some.py").write_text(text)
    (tmp_path / "_helper.py").write_text("raise SystemExit")
    monkeypatch.setattr(paths, "protocols", lambda: tmp_path)
    (found,) = registry.protocols().values()
    assert (found.name, found.version, found.needs, found.summary) == ("some", 3, ("masks",), "What it does.")
    with pytest.raises(UnknownName, match=r"unknown protocol 'som'\. Did you mean some\?"):
        registry.protocol("som")

    registry.protocols.cache_clear()
    (tmp_path / "some.py").write_text(text.replace("VERSION", "REVISION"))
    with pytest.raises(ConfigError, match=r"some\.py must state VERSION and NEEDS"):
        registry.protocols()


CODE = '''
"""Module."""
LIMIT = 3  # a comment


class Thing:
    """Class."""

    def double(self, x: float) -> float:
        """Function."""
        return 2 * x
'''
SAME_CODE = """


LIMIT = 3
class Thing:
  'Another text.'
  # and a comment


  def double(
      self,
      x: float,
  ) -> float:
    return (2
            * x)
"""


def hash_of(tmp_path: Path, code: str) -> str:
    (tmp_path / "code.py").write_text(textwrap.dedent(code))
    return registry.code_hash(tmp_path / "code.py")


def test_the_hash_is_blind_to_comments_docstrings_and_layout(tmp_path: Path) -> None:
    assert hash_of(tmp_path, CODE) == hash_of(tmp_path, SAME_CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LIMIT = 3", "LIMIT = 4"),
        ("LIMIT = 3", "LIMIT = 3.0"),
        ("2 * x", "x * 2"),
        ("2 * x", "2 * y"),
        ("self, x: float", "self, x: float = 1"),
        ("double", "twice"),
        ("class Thing:", "@final\nclass Thing:"),
        ("return 2 * x", "'not a docstring'.strip(); return 2 * x"),
    ],
)
def test_the_hash_follows_the_code(old: str, new: str, tmp_path: Path) -> None:
    assert old in CODE
    assert hash_of(tmp_path, CODE) != hash_of(tmp_path, CODE.replace(old, new))


def test_the_hash_of_a_folder_covers_its_python_files_wherever_the_folder_is(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        (folder / "sub").mkdir(parents=True)
        (folder / "a.py").write_text("A = 1\n")
        (folder / "sub" / "b.py").write_text("B = 2\n")
    (other / "README.md").write_text("text")
    (other / "method.toml").write_text("x = 1")
    before = registry.code_hash(one)
    assert registry.code_hash(other) == before
    assert registry.code_hash(one, other) != before
    (other / "sub" / "b.py").rename(other / "sub" / "c.py")
    assert registry.code_hash(other) != before
    (other / "sub" / "c.py").unlink()
    assert registry.code_hash(other) != before


def test_the_code_of_a_method_is_what_its_weights_depend_on() -> None:
    top = paths.PACKAGE
    found = registry.method_code("masked_frequency_modeling")
    assert registry.method("masked_frequency_modeling").folder / "method.py" in found
    assert {top / "models" / "vit.py", top / "models" / "resnet.py", top / "augment" / "geometry.py"} <= found
    # neither the authors' names nor the networks of others
    assert {file.name for file in found}.isdisjoint({"official.py", "beit.py", "mae.py"})
    folder = registry.method("latent_mim").folder
    assert {folder / "method.py", folder / "model.py"} <= registry.method_code("latent_mim")
