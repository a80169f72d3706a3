"""What a run leaves: one JSON file, written atomically, read strictly.

Records are the truth; the database is built from them. They are published, so the user's home folder is
written as ``~``.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import glob
import json
import math
import os
import secrets
import time
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimbench import config, foreign, paths, registry
from mimbench.curve import Curve
from mimbench.environment import Facts
from mimbench.errors import ResultsError
from mimbench.task import Metric

if TYPE_CHECKING:
    import numpy as np

SCHEMA = 3


def _budgets(content: dict[str, Any]) -> dict[str, Any]:
    """Schema 2 says what training by a budget came to, and whether the model was compiled."""
    recipe = content["config"].setdefault("recipe", {})
    content["pretrain"]["compiled"] = bool(recipe.get("compile"))
    recipe["budget"] = None
    return content | {"schema": 2}


def _reads(content: dict[str, Any]) -> dict[str, Any]:
    """Schema 3 counts how often test labels were read: once by a run of before, however often it was repeated."""
    never = content["protocol"]["name"] in ("generation", "throughput")  # which look at no label
    return content | {"test_reads": 0 if never else 1, "schema": 3}


# From a schema number to the function that turns such a record's content into that of the next schema.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _budgets, 2: _reads}


@dataclass(frozen=True)
class MethodUsed:
    """The method and its code."""

    slug: str
    code_hash: str  # method_code(slug) when it ran


@dataclass(frozen=True)
class ProtocolUsed:
    """The protocol, its code and everything set in it."""

    name: str
    version: int
    recipe: str
    code_hash: str  # protocol_code(name) when it ran
    settings: dict[str, Any]  # the protocol's Settings, in full


@dataclass(frozen=True)
class Pretraining:
    """How the weights came about. Where nothing was trained, images, steps and epochs are 0."""

    dataset: str
    data_fingerprint: str
    key: str  # of the checkpoint, shared by all runs that evaluate it
    images: int  # images seen
    steps: int  # optimizer steps
    epochs: float
    seconds: float  # wall time over all resumed parts
    device_seconds: float  # the same summed over GPUs; without one, processor time summed over cores
    resumed: int  # how many times it went on from a checkpoint
    peak_memory: int  # bytes on the GPU, or of the process
    precision: str  # fp32 or bf16: what "auto" came to
    compiled: bool  # whether torch.compile was used


@dataclass(frozen=True)
class DataUsed:
    """The data that the protocol scored on."""

    name: str
    fingerprint: str
    note: str  # what a reader must know, e.g. "JPEG re-encoding"
    n_train: int
    n_test: int


@dataclass(frozen=True)
class EncoderUsed:
    """The encoder that was scored."""

    parameters: int
    readout: str  # how the pooled feature is read
    dim: int  # its width
    input_size: int  # side of the input, in pixels
    input_mean: list[float]  # per channel, of values in [0, 1]
    input_std: list[float]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run. ``id`` says which run it is; runs of equal ``fingerprint`` were scored in the same way."""

    command: str  # repeats the run
    method: MethodUsed
    protocol: ProtocolUsed
    config: dict[str, Any]  # the method's Config, in full
    preset: str
    overrides: dict[str, Any]  # as given with --set, nested
    seed: int
    pretrain: Pretraining
    data: DataUsed
    encoder: EncoderUsed
    backbone: str  # for people, e.g. "vit 12x192/4" or "resnet18-cifar"
    environment: Facts
    git: Facts
    seconds: dict[str, float]  # wall time per stage
    curve: list[dict[str, float]]  # of pretraining: step, epoch, lr, loss and logged scalars
    metrics: dict[str, Metric]
    primary: str  # the metric that ranks
    test_reads: int = 1  # of test labels, for this run and all that it replaced
    details: dict[str, Any] = field(default_factory=dict)
    correct: str | None = None  # per test item, see pack(); None where the metric is no accuracy
    warnings: list[str] = field(default_factory=list)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = field(default_factory=lambda: SCHEMA, init=False)
    id: str = field(init=False)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        identity = run_id(
            method=self.method.slug,
            preset=self.preset,
            overrides=self.overrides,
            pretrain_dataset=self.pretrain.dataset,
            protocol=self.protocol.name,
            recipe=self.protocol.recipe,
            dataset=self.data.name,
            seed=self.seed,
        )
        object.__setattr__(self, "id", identity)
        object.__setattr__(self, "fingerprint", fingerprint(self.protocol, self.data, self.encoder))

    @property
    def budget(self) -> str | None:
        """What pretraining could take, as ``--budget`` says it; None where its recipe says how many epochs."""
        recipe = self.config.get("recipe")
        budget = recipe.get("budget") if isinstance(recipe, dict) else None
        return budget if isinstance(budget, str) else None

    @property
    def score(self) -> Metric:
        """The metric that ranks."""
        return self.metrics[self.primary]


def run_id(
    *,
    method: str,
    preset: str,
    overrides: Mapping[str, Any],
    pretrain_dataset: str,
    protocol: str,
    recipe: str,
    dataset: str,
    seed: int,
) -> str:
    """The name of a run: the same for the same request, whatever the code, the machine and the day."""
    return config.digest(
        *("run", method, preset, without_home(dict(overrides)), without_home(pretrain_dataset)),
        *(protocol, recipe, without_home(dataset), seed),
    )


def fingerprint(protocol: ProtocolUsed, data: DataUsed, encoder: EncoderUsed) -> str:
    """A hash of the yardstick: protocol, version, every setting, data, and the size of the input.

    What belongs to the thing measured stays out: weights, readout and normalisation are the method's own,
    named in its row, and a ViT that reads a token ranks beside a network that averages a map.
    """
    return config.digest(
        *("score", protocol.name, protocol.version, without_home(protocol.settings)),
        *(data.fingerprint, encoder.input_size),
    )


@functools.cache
def method_code(slug: str) -> str:
    """The hash of a method's code as it is now, with the shared networks and augmentations that it uses."""
    return registry.code_hash(*registry.method_code(slug))


@functools.cache
def protocol_code(name: str) -> str:
    """The hash of a protocol's code as it is now."""
    return registry.code_hash(registry.protocol(name).file)


def test_selected(record: Record) -> bool:
    """Whether the best of several scores on the test split was taken: then it estimates nothing but that best."""
    return record.details.get("chosen_on") == "test"


def setting(record: Record) -> str:
    """A hash that two runs share when they differ by their seed, protocol or evaluation data alone."""
    pretrain, budget = record.pretrain, record.budget
    return config.digest(
        *("setting", record.method.slug, record.preset, record.backbone, record.config),
        *(pretrain.data_fingerprint, budget or pretrain.epochs),  # seeds get differently far in the same time
    )


def stale(record: Record) -> str | None:
    """Why the record no longer speaks of today's code, or None."""
    return stale_code(record.method, record.protocol)


def stale_code(method: MethodUsed, protocol: ProtocolUsed) -> str | None:
    """Why a record made with this code no longer speaks of today's, or None."""
    if method.slug not in registry.methods():
        return f"method {method.slug} is no longer here"
    if protocol.name not in registry.protocols():
        return f"protocol {protocol.name} is no longer here"
    version = registry.protocol(protocol.name).version
    reasons = []
    if method.code_hash != method_code(method.slug):
        reasons.append(f"the code of {method.slug} has changed")
    if protocol.version != version:
        reasons.append(f"{protocol.name} is now at version {version}, this is of version {protocol.version}")
    elif protocol.code_hash != protocol_code(protocol.name):
        reasons.append(f"the code of {protocol.name} has changed")
    return "; ".join(reasons) or None


def pack(correct: np.ndarray) -> str:
    """(N,) bool as text: N, a colon, and the bits in base64."""
    import numpy as np

    return f"{len(correct)}:{base64.b64encode(np.packbits(correct).tobytes()).decode()}"


def unpack(text: str) -> np.ndarray:
    """(N,) bool from what ``pack`` wrote. Raises ResultsError for anything else."""
    import numpy as np

    try:
        number, bits = text.split(":")
        count = int(number)
        packed = np.frombuffer(base64.b64decode(bits, validate=True), dtype=np.uint8)
        if count < 0 or len(packed) != -(-count // 8):
            raise ValueError(f"{len(packed)} bytes hold no {count} bits")
    except ValueError as fault:
        raise ResultsError(f"a record's list of correct test items is damaged: {fault}") from None
    return np.unpackbits(packed, count=count).astype(bool)


def place(record: Record, folder: Path) -> Path:
    """Where a record lies in a results folder, whatever it calls its method and protocol."""
    return folder / "runs" / _folder(record.method.slug) / _folder(record.protocol.name) / f"{record.id}.json"


def _folder(name: str) -> str:
    """A name as that of a folder; another one for what ``loads`` would refuse as a name."""
    return name if foreign.is_name(name) else f"_{config.digest(name)}"


def write(record: Record, folder: Path) -> Path:
    """Writes a record to its place, replacing an earlier one of the same run.

    Raises ResultsError when it cannot be written or holds what no record may (NaN, infinity, a wrong type).
    The content is not lost even then: it goes to ``unsaved`` in the cache, or else to standard output.
    """
    file = place(record, folder)
    try:
        text = dumps(record)
        loads(text, str(file))
        write_text(file, text)
    except OSError as fault:
        kept = _rescue(record)
        raise ResultsError(
            f"results were meant to go to {folder}, which cannot be written: {fault.strerror or fault}",
            f"{kept}. Set MIMBENCH_RESULTS to a folder that can be written",
        ) from None
    except ResultsError as fault:
        raise ResultsError(fault.problem, _rescue(record)) from None
    return file


def reads_before(file: Path) -> int:
    """How often test labels were read by the runs that a new record replaces; once by one that is damaged."""
    try:
        return read(file).test_reads if file.is_file() else 0
    except ResultsError:
        return 1


def receive(record: Record, folder: Path) -> Path:
    """Writes a record that was made elsewhere, with the reads of test labels by the one that it replaces."""
    reads = record.test_reads + reads_before(place(record, folder))
    return write(dataclasses.replace(record, test_reads=reads), folder)


def content(record: Record) -> dict[str, Any]:
    """A record as plain tables and lists, without the name of the user's home folder."""
    return without_home(dataclasses.asdict(record) | {"curve": list(record.curve)})


def dumps(record: Record) -> str:
    """A record as JSON: sorted keys, floats that read back to the same bits. Refuses NaN and infinities."""
    found = content(record)
    _refuse_non_finite(found, "")
    try:
        return json.dumps(found, sort_keys=True, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as fault:
        raise ResultsError(f"the record cannot be written as JSON: {fault}") from None


def loads(text: str, where: str) -> Record:
    """A record from JSON, whatever its schema; ``where`` names its source in errors."""
    try:
        content = foreign.decode_json(text)
    except ValueError as fault:
        raise ResultsError(f"{where} is not JSON that a record may be: {fault}") from None
    if not isinstance(content, dict) or type(content.get("schema")) is not int:
        raise ResultsError(f"{where} is not a record: it has no schema number")
    if content["schema"] > SCHEMA:
        raise ResultsError(
            f"{where} has schema {content['schema']}, newer than {SCHEMA}, the newest that this mimbench reads",
            "Update mimbench",
        )
    while content["schema"] < SCHEMA:
        if content["schema"] not in MIGRATIONS:
            raise ResultsError(f"{where} has schema {content['schema']}, which never existed")
        try:
            content = MIGRATIONS[content["schema"]](content)
        except (KeyError, TypeError, AttributeError):
            raise ResultsError(
                f"{where} is not a record of the schema {content['schema']} that it names"
            ) from None
    record: Record = parse(content, Record, where)
    object.__setattr__(record, "curve", Curve(record.curve))
    if record.primary not in record.metrics:
        raise ResultsError(f"{where}: the primary metric '{record.primary}' is not among the metrics")
    for kind, name in (("method", record.method.slug), ("protocol", record.protocol.name)):
        if not foreign.is_name(name):
            raise ResultsError(
                f"{where}: '{name}' is no name of a {kind}", "Lower-case letters, digits and _ make one"
            )
    if not foreign.is_moment(record.created):
        raise ResultsError(f"{where}: created is '{record.created}', not a time with its zone")
    for name in ("id", "fingerprint"):
        if content[name] != getattr(record, name):
            raise ResultsError(f"{where} was edited: its {name} does not follow from its content")
    return record


def read(file: Path) -> Record:
    """The record in a file. Raises ResultsError that names the file and what is wrong in it."""
    try:
        text = foreign.read_text(file)
    except OSError as fault:
        raise ResultsError(f"{file} cannot be read: {fault.strerror or fault}") from None
    except UnicodeDecodeError:
        raise ResultsError(f"{file} is not text") from None
    return loads(text, str(file))


def files(folder: Path) -> list[Path]:
    """The files of all records in a results folder, in a stable order."""
    return sorted((folder / "runs").glob("*/*/*.json"))


def read_in_place(file: Path, folder: Path) -> Record:
    """Like ``read``, for a file of a results folder: also refuses a copy under another name."""
    record = read(file)
    if place(record, folder) != file:
        proper = place(record, folder).relative_to(folder)
        raise ResultsError(f"{file} lies in the wrong place", f"Its run belongs to {proper}")
    return record


def scan(folder: Path) -> tuple[list[Record], list[ResultsError]]:
    """All records of a results folder, and what is wrong with the files that are none."""
    records, faults = [], []
    for file in files(folder):
        try:
            records.append(read_in_place(file, folder))
        except ResultsError as fault:
            faults.append(fault)
    return records, faults


def write_text(file: Path, text: str) -> None:
    """Writes a file so that, after a crash at any moment, it is there as it was before or in full.

    Also removes what a process left that was killed while it wrote the same file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    _remove_orphans(file)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    if os.name != "nt":  # there a folder cannot be opened
        handle = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_orphans(file: Path) -> None:
    """Removes unfinished copies of a file; not those of a minute or less, which another process may be writing."""
    for orphan in file.parent.glob(f".{glob.escape(file.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if (
                abs(time.time() - orphan.stat().st_mtime) > 60
            ):  # a clock that was set back makes it from the future
                orphan.unlink()


def _rescue(record: Record) -> str:
    """Keeps what ``write`` could not; a sentence that says where it is."""
    text = json.dumps(content(record), indent=1, default=repr, skipkeys=True) + "\n"
    file = place(record, paths.cache() / "unsaved")
    try:
        write_text(file, text)
    except OSError:
        print(text)
        return "The record is printed above, as it could not be kept in the cache either"
    return f"The record is kept in {file}"


def without_home(value: Any) -> Any:
    """Strings with the user's home folder written as ``~``, at any depth of tables and lists."""
    home = Path.home()
    return _replaced(value, str(home)) if len(home.parts) > 1 else value


def _replaced(value: Any, home: str) -> Any:
    if isinstance(value, str):
        return value.replace(home, "~")
    if isinstance(value, dict):
        return {key: _replaced(item, home) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, home) for item in value]
    return value


def _refuse_non_finite(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ResultsError(f"{where} is {value}, which no record may hold")
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_non_finite(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for position, item in enumerate(value):
            _refuse_non_finite(item, f"{where}[{position}]")


CURVE = list[dict[str, float]]


def parse(value: Any, kind: Any, where: str) -> Any:
    """``value``, as JSON gave it, as the type ``kind``. Raises ResultsError for anything else."""
    if kind is Any:
        if not foreign.sound(value):
            raise ResultsError(f"{where} is nested too deep")
        return value
    origin, arguments, is_dataclass = _shape(kind)
    if is_dataclass:
        return _parse_dataclass(value, kind, where)
    if origin is dict and isinstance(value, dict):
        return {key: parse(item, arguments[1], f"{where}: {key}") for key, item in value.items()}
    if origin is list and isinstance(value, list):
        is_curve = kind == CURVE and all(type(item) is dict for item in value)
        if is_curve and {type(number) for item in value for number in item.values()} <= {float, int}:
            return value  # most of a record
        return [parse(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value)]
    allowed = arguments if origin is types.UnionType else (kind,)
    if type(value) in allowed or (type(value) is int and float in allowed):
        return value
    names = " or ".join(getattr(k, "__name__", str(k)) for k in allowed)
    raise ResultsError(f"{where} should be {names}, not {value!r:.60}")


@functools.cache
def _shape(kind: Any) -> tuple[Any, tuple[Any, ...], bool]:
    return typing.get_origin(kind), typing.get_args(kind), dataclasses.is_dataclass(kind)


_hints = functools.cache(typing.get_type_hints)  # evaluates annotations, which takes longer than the rest


def _parse_dataclass(value: Any, kind: Any, where: str) -> Any:
    hints = _hints(kind)
    if not isinstance(value, dict):
        raise ResultsError(f"{where} should be a table, not {value!r:.60}")
    if unknown := value.keys() - hints.keys():
        raise ResultsError(f"{where} has unknown keys: {', '.join(sorted(unknown))}")
    if missing := hints.keys() - value.keys():
        raise ResultsError(f"{where} lacks: {', '.join(sorted(missing))}")
    parsed = {name: parse(value[name], hint, f"{where}: {name}") for name, hint in hints.items()}
    return kind(**{f.name: parsed[f.name] for f in dataclasses.fields(kind) if f.init})
