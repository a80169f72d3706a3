"""The ``mimbench`` command. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimbench.errors import ConfigError, MimbenchError, ResultsError, ran_out_of_memory
from mimbench.visible import one_line, printable

if TYPE_CHECKING:
    from rich.table import Table

    from mimbench.record import Record
    from mimbench.runner import Outcome
    from mimbench.sweep.plan import Plan
    from mimbench.verdict import Verdict

app = typer.Typer(
    help="Masked image modelling and self-supervised learning under one protocol.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
listing = typer.Typer(help="List what there is.", no_args_is_help=True, rich_markup_mode=None)
new_app = typer.Typer(help="Add to the suite.", no_args_is_help=True, rich_markup_mode=None)
data_app = typer.Typer(help="Look after data sets.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(listing, name="list")
app.add_typer(data_app, name="data")
app.add_typer(new_app, name="new")

# A full disk, a place that is read-only, or a file where a folder is needed.
UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
)

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it

# Newer typers carry a copy of click, so their errors are not click's: the class is found through typer's own.
_UsageError: type[Any] = typer.BadParameter.__bases__[0]

Methods = Annotated[str, typer.Option("--method", "-m", help="One or several methods, separated by commas.")]
Protocols = Annotated[
    str, typer.Option("--protocol", "-p", help="One or several protocols; NAME:RECIPE picks a recipe.")
]
DatasetName = Annotated[
    str, typer.Option("--dataset", "-d", help="A name or place: see 'mimbench list datasets'.")
]
EvalDataset = Annotated[
    str | None, typer.Option(help="Evaluate on other data than the method was pretrained on.")
]
Preset = Annotated[
    str | None, typer.Option(help="A preset of the method; by default the one that suits the data.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**62, help="The seed, or the first of several.")]
Seeds = Annotated[int, typer.Option(min=1, max=1000, help="How many seeds.")]
Settings = Annotated[
    list[str], typer.Option("--set", help="key=value of the method, or PROTOCOL.key=value; may be repeated.")
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="Pretrain for 90s, 2m, 1.5h or 200000img (images seen) instead of the preset's epochs."
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="Score a published checkpoint of the method instead of pretraining: .safetensors, .pth."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Force = Annotated[bool, typer.Option("--force", help="Repeat what is recorded already.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def main() -> None:
    """The entry point: runs the command and turns faults into one line and an exit code."""
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer has caught Ctrl-C; older ones raise Abort
            raise KeyboardInterrupt
    except MimbenchError as fault:
        code = _fail(str(fault), fault.exit_code)
    except _UsageError as fault:
        message = fault.format_message()
        if type(fault).__name__ == "NoArgsIsHelpError":  # the message is the help text
            _echo(message)
            sys.exit(0)
        code = _fail(message, 2)
    except (KeyboardInterrupt, typer.Abort) as fault:
        if isinstance(fault.__cause__, EOFError):  # which typer takes for Ctrl-D
            raise fault.__cause__ from None
        code = _fail(
            "interrupted. What was finished is recorded; the same command goes on from there.", INTERRUPTED
        )
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except OSError as fault:
        if fault.errno not in UNWRITABLE:
            raise
        code = _fail(f"{fault.filename or 'a file'} cannot be written: {fault.strerror}.", 2)
    except (RuntimeError, MemoryError) as fault:
        if not ran_out_of_memory(fault):
            raise
        code = _fail(
            "the device ran out of memory. Try a smaller recipe.batch_size, or --set recipe.accumulate=auto.",
            2,
        )
    sys.exit(code or 0)


def _fail(message: str, code: int) -> int:
    _echo(f"error{_speaker()}: {one_line(' '.join(message.split()))}", err=True)
    return code


def _echo(message: object, err: bool = False) -> None:
    """Prints what may hold texts of others: no character of theirs steers the terminal."""
    typer.echo(printable(str(message)), err=err)


def _speaker() -> str:
    """Which of the processes of torchrun says something, if there are several."""
    several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
    return f" in process {os.environ['RANK']} of {os.environ['WORLD_SIZE']}" if several else ""


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ConfigError("an empty list of names was given")
    return names


def _overrides(settings: list[str], budget: str | None) -> tuple[str, ...]:
    """What ``--set`` and its short forms change."""
    if budget is None:
        return tuple(settings)
    bare = budget[
        -1:
    ].isalpha()  # else TOML would take it for a number, and the message would not be about units
    return (*settings, f"recipe.budget={budget}" if bare else f'recipe.budget="{budget}"')


def _print_table(columns: list[str], rows: list[list[Any]], title: str = "") -> None:
    """A table on standard output; wide ones are not cut where the output is no terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table: Table = Table(
        title=Text(printable(title)) if title else None,
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for column in columns:
        table.add_column(Text(printable(column)), overflow="fold")
    for row in rows:
        table.add_row(
            *(
                cell if isinstance(cell, Text) else Text("" if cell is None else printable(str(cell)))
                for cell in row
            )
        )
    console = Console()
    if not console.is_terminal:
        console.width = 10_000
    console.print(table)


def _print_json(content: Any) -> None:
    _echo(json.dumps(content, indent=2, sort_keys=True))


def _runs(may_pretrain: bool) -> Callable[..., None]:
    """The commands ``run`` and ``evaluate``, which differ in whether they may pretrain."""

    def command(
        method: Methods,
        protocol: Protocols,
        dataset: DatasetName = "digits",
        eval_dataset: EvalDataset = None,
        preset: Preset = None,
        seed: Seed = 0,
        seeds: Seeds = 1,
        set_: Settings = [],  # noqa: B006
        budget: Budget = None,
        weights: Weights = None,
        device: Device = "auto",
        force: Force = False,
        database: Annotated[
            bool, typer.Option(help="Bring the database up to date after each run, not when it is next read.")
        ] = True,
        as_json: AsJson = False,
        quiet: Quiet = False,
    ) -> None:
        from mimbench import distributed, runner
        from mimbench.progress import Progress

        request = runner.Request(
            methods=_names(method),
            protocols=_names(protocol),
            dataset=dataset,
            eval_dataset=eval_dataset,
            preset=preset,
            seeds=tuple(range(seed, seed + seeds)),
            overrides=_overrides(set_, budget),
            weights=weights,
            device=device,
            force=force,
            may_pretrain=may_pretrain,
            database=database,
        )
        outcomes: list[Outcome] = []
        try:
            outcomes.extend(runner.run(request, Progress(quiet=quiet)))
        finally:  # what was finished before a fault or Ctrl-C is shown too
            if as_json and not distributed.launched_as():
                from mimbench.record import content

                _print_json([content(outcome.record) for outcome in outcomes])
            elif outcomes:
                _print_outcomes(outcomes)

    return command


app.command("run", help="Pretrain a method, evaluate it, record the result.")(_runs(may_pretrain=True))
app.command("evaluate", help="Evaluate what 'mimbench pretrain' has trained, and record the result.")(
    _runs(may_pretrain=False)
)


def _print_outcomes(outcomes: list[Outcome]) -> None:
    """One line a run, and the commands that repeat them."""
    rows = []
    for outcome in outcomes:
        made = outcome.record
        rows.append(
            [
                made.method.slug,
                f"{made.protocol.name}:{made.protocol.recipe}",
                made.data.name,
                made.seed,
                made.primary,
                _value(made),
                _seconds(made.pretrain.seconds),
                _seconds(made.seconds["total"]),
                "" if outcome.repeated else "recorded before",
            ]
        )
    columns = [
        "method",
        "protocol",
        "data",
        "seed",
        "metric",
        "value [95 % interval]",
        "pretraining",
        "evaluation",
        "",
    ]
    _print_table(columns, rows)
    _echo("\nTo repeat:")
    for outcome in outcomes:
        _echo(f"  {outcome.record.command}")
    _echo("To see it beside the paper's numbers:\n  mimbench report")


def _value(made: Record) -> str:
    score = made.score
    unit = "" if score.unit in ("%", "") else f" {score.unit}"
    if score.low is None:
        return f"{score.value:.2f}{unit}"
    return f"{score.value:.2f} [{score.low:.2f}, {score.high:.2f}]{unit}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


@app.command()
def pretrain(
    method: Methods,
    dataset: DatasetName = "digits",
    preset: Preset = None,
    seed: Seed = 0,
    seeds: Seeds = 1,
    set_: Settings = [],  # noqa: B006
    budget: Budget = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Pretrain a method and keep its weights; 'mimbench run' and 'evaluate' find them."""
    from mimbench import runner
    from mimbench.progress import Progress

    request = runner.Request(
        methods=_names(method),
        dataset=dataset,
        preset=preset,
        seeds=tuple(range(seed, seed + seeds)),
        overrides=_overrides(set_, budget),
        device=device,
    )
    for trained in runner.pretrain_all(request, Progress(quiet=quiet)):
        history = trained.history
        last = f", loss {history.curve[-1]['loss']:.4f}" if history.curve else ""
        _echo(
            f"{trained.slug} seed {trained.seed}: {history.images} images in {_seconds(history.seconds)}{last}\n"
            f"  {trained.folder / 'model.safetensors'}"
        )


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="A sweep.toml: which runs there should be.")],
    executor: Annotated[
        str, typer.Option(help="local: processes of this machine; ray: a Ray cluster.")
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Tasks at a time on this machine; by default as many as have cores."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="The Ray cluster; by default RAY_ADDRESS, the one that runs here, or a new one."),
    ] = None,
    budget: Budget = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu or cuda, instead of what the file says.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and do nothing.")] = False,
    force: Force = False,
    logs: Annotated[Path | None, typer.Option(help="Where tasks log; by default in the cache.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Do all runs of a file, pretraining what they share once; skips what is recorded. Exit 1 when a task failed."""
    from mimbench.errors import UnknownName
    from mimbench.progress import Progress
    from mimbench.sweep import file as sweeps
    from mimbench.sweep import plan as planning

    if executor not in ("local", "ray"):
        raise UnknownName("executor", executor, ("local", "ray"))
    if executor == "ray" and workers:
        raise ConfigError(
            "--workers is for the executor local", "Ray's machines say themselves how much they take"
        )
    progress = Progress(quiet=quiet)
    plan = planning.plan(sweeps.read(file, device), progress, force=force, budget=budget)
    if dry_run:
        if as_json:
            _print_json(planning.content(plan))
        else:
            _print_plan(plan)
        return
    from mimbench import sweep as sweeping

    found = sweeping.run(plan, executor, workers=workers, address=address, logs=logs, quiet=quiet)
    if as_json:
        _print_json(found.content())
    else:
        _echo("\n".join(found.summary()))
    if found.state.failed:
        raise typer.Exit(1)


def _print_plan(plan: Plan) -> None:
    """What a sweep will do, what it leaves out, and why."""
    from mimbench.sweep import plan as planning

    titles = ["pretraining" if name == "pretrain" else name for name in planning.groups(plan)]
    _print_table(["method", *titles], planning.overview(plan), "to do, of how many")
    parts = [
        f"{plan.count(kind, todo=True)} of {plan.count(kind, todo=False)} {name}"
        for kind, name in (("pretrain", "pretrainings"), ("evaluate", "evaluations"))
    ]
    _echo(f"\nTo do: {' and '.join(parts)}; the rest is there already, or nothing needs it.")
    if plan.left_out:
        _echo("\nLeft out:")
        for each in plan.left_out:
            _echo(f"  {each.what}: {each.reason}")


@listing.command("methods")
def list_methods(as_json: AsJson = False) -> None:
    """The methods, one folder each."""
    from mimbench import registry

    cards = registry.methods().values()
    if as_json:
        _print_json(
            {c.slug: {"title": c.title, "family": c.family, "presets": list(c.presets)} for c in cards}
        )
        return
    rows = [[c.slug, f"{c.venue}", c.arxiv, c.title, ", ".join(c.presets)] for c in cards]
    _print_table(["method", "venue", "arXiv", "title", "presets"], rows)


@listing.command("protocols")
def list_protocols(as_json: AsJson = False) -> None:
    """The protocols, one file each."""
    from mimbench import registry

    cards = registry.protocols().values()
    if as_json:
        _print_json({c.name: {"version": c.version, "needs": c.needs, "summary": c.summary} for c in cards})
        return
    rows = [[c.name, c.version, ", ".join(c.needs), c.summary] for c in cards]
    _print_table(["protocol", "version", "needs", ""], rows)


@listing.command("datasets")
def list_datasets(as_json: AsJson = False) -> None:
    """The data sets that have a name, and the kinds of places."""
    from mimbench.data.names import catalogue

    if as_json:
        _print_json(catalogue())
        return
    _print_table(["data set", ""], [[name, text] for name, text in catalogue().items()])


@listing.command("runs")
def list_runs(as_json: AsJson = False) -> None:
    """The recorded runs, newest first."""
    from mimbench import paths, record

    records, faults = record.scan(paths.results())
    records = sorted(records, key=lambda made: made.created, reverse=True)
    if as_json:
        _print_json([record.content(made) for made in records])
        return
    rows = [
        [
            made.id,
            made.method.slug,
            f"{made.protocol.name}:{made.protocol.recipe}",
            made.data.name,
            made.preset,
            made.seed,
            f"{made.primary} {_value(made)}",
            made.created,
            "stale" if record.stale(made) else "",
        ]
        for made in records
    ]
    _print_table(["run", "method", "protocol", "data", "preset", "seed", "result", "recorded", ""], rows)
    for fault in faults:
        _echo(f"warning: {fault}", err=True)


@app.command()
def show(name: Annotated[str, typer.Argument(help="A run's id (or its beginning), or a method.")]) -> None:
    """Everything about one run, as JSON; or a method's card and presets."""
    from mimbench import config, record, registry

    if name in registry.methods():
        card = registry.method(name)
        module = registry.load_method(name)
        presets = {p: config.to_dict(config.build(module.Config, card.preset(p))) for p in card.presets}
        facts = {"title": card.title, "arxiv": card.arxiv, "code": card.code, "summary": card.summary}
        _print_json({**facts, "protocols": card.protocols, "deviations": card.deviations, "presets": presets})
        return
    _print_json(record.content(_run_of(name, also=list(registry.methods()))))


def _run_of(name: str, also: Sequence[str] = ()) -> Record:
    """The recorded run whose id begins with ``name``; ``also`` are names that would have been known too."""
    from mimbench import paths, record
    from mimbench.errors import UnknownName

    records, _ = record.scan(paths.results())
    found = [made for made in records if made.id.startswith(name)]
    if len(found) > 1:
        raise ConfigError(f"'{name}' begins {len(found)} runs", f"They are {', '.join(m.id for m in found)}")
    if not found:
        what = "run or method" if also else "run"
        raise UnknownName(what, name, [*also, *(made.id for made in records)])
    return found[0]


@app.command()
def verify(
    run: Annotated[str, typer.Argument(help="A run's id, or its beginning.")],
    reuse: Annotated[
        bool, typer.Option("--reuse", help="Take a pretraining from the cache: repeat the evaluation alone.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Repeat a recorded run here: do its metrics lie within their recorded intervals? Exit 1 if not."""
    from mimbench import verify as repeating

    recorded = _run_of(run)
    if not (quiet or as_json):
        _echo(f"Repeating: {recorded.command}", err=True)
    found = repeating.verify(recorded, reuse=reuse, quiet=quiet or as_json)
    if as_json:
        _print_json({**dataclasses.asdict(found), "passed": found.passed})
    else:
        rows = []
        for line in found.lines:
            interval = "" if line.low is None else f"{line.low:.2f} to {line.high:.2f}"
            ranks = " (ranks)" if line.name == found.primary else ""
            verdict = line.verdict
            rows.append(
                [
                    line.name + ranks,
                    f"{line.recorded:.4g}",
                    interval,
                    f"{line.repeated:.4g}",
                    line.unit,
                    verdict,
                ]
            )
        _print_table(["metric", "recorded", "95 % interval", "now", "", "verdict"], rows)
        for name, (then, now) in found.environment.items():
            _echo(f"{name} was {then} and is {now}")
        if found.code:
            _echo(f"today's code is another: {found.code}")
        done = "lies within its recorded interval" if found.passed else "lies OUTSIDE its recorded interval"
        _echo(f"{found.primary} of run {found.run} {done}, after {_seconds(found.seconds)}")
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(help="Two or more runs (an id or its beginning) or methods.")],
    protocol: Annotated[
        str | None, typer.Option("--protocol", "-p", help="Of methods: the runs of this NAME or NAME:RECIPE.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="Of methods: the runs scored on these data.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Of methods: the runs of this preset.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say which of several runs is better on the same test images, whether that is chance, and at what cost."""
    from mimbench import compare as comparing
    from mimbench import paths, record

    records, faults = record.scan(paths.results())
    for fault in faults:
        _echo(f"warning: {fault}", err=True)
    found = comparing.compare(comparing.choose(names, records, protocol, dataset, preset))
    if as_json:
        _print_json(found.content())
        return
    for title, columns, rows in found.tables():
        _echo(title)
        _print_table(columns, rows)
        _echo("")
    for note in found.notes:
        _echo(f"note: {note}")


@app.command()
def explain(
    a: Annotated[str, typer.Argument(help="A recipe such as knn:dino, or a run (its id or the beginning).")],
    b: Annotated[
        str, typer.Argument(help="Likewise; or, beside a run, reported or reported:N of its paper's numbers.")
    ],
    features: Annotated[
        Path | None, typer.Option(help="Recipes on the features of an .npz, as 'mimbench score' takes it.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="Recipes on this pretrained method.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="What it was pretrained on; by default digits.")
    ] = None,
    eval_dataset: EvalDataset = None,
    preset: Preset = None,
    seed: Annotated[int | None, typer.Option(help="The seed of its pretraining; by default 0.")] = None,
    set_: Settings = [],  # noqa: B006
    weights: Weights = None,
    device: Device = "auto",
    record_: Annotated[
        bool, typer.Option("--record", help="Keep it in results/explained, which the report shows.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say how many points each setting is worth between two ways of scoring one encoder."""
    from mimbench import explain as explaining
    from mimbench import explanation, paths, record
    from mimbench.progress import Progress

    question = explaining.Question(
        a,
        b,
        features=features,
        method=method,
        dataset=dataset,
        eval_dataset=eval_dataset,
        preset=preset,
        seed=seed,
        overrides=tuple(set_),
        weights=weights,
        device=device,
    )
    records, faults = record.scan(paths.results())
    for fault in faults:
        _echo(f"warning: {fault}", err=True)
    found = explaining.explain(question, records, Progress(quiet=quiet))
    file = explanation.write(found, paths.results()) if record_ else None
    if as_json:
        _print_json({**dataclasses.asdict(found), "walked": found.walked, "rest": found.rest})
        return
    for title, columns, rows in explaining.tables(found):
        if title:
            _echo(title)
        _print_table(columns, rows)
        _echo("")
    _echo(explaining.headline(found))
    for note in found.notes:
        _echo(f"note: {note}")
    if file:
        _echo(f"recorded: {file}")


@app.command()
def verdicts(
    name: Annotated[
        str | None, typer.Argument(metavar="[METHOD]", help="Numbers of this paper or method alone.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say of each number that papers report whether it is reproduced here, different, or why it cannot be tested."""
    from mimbench import paths, report, verdict
    from mimbench.errors import UnknownName

    source = report.load(paths.results())
    found = report.verdicts(source)
    if name is not None:
        known = dict.fromkeys(each.theirs[key] for each in found for key in ("slug", "method"))
        found = [each for each in found if name in (each.theirs["slug"], each.theirs["method"])]
        if not found:
            raise UnknownName("paper or method with reported numbers", name, known)
    for fault in source.faults:
        _echo(f"warning: {fault}", err=True)
    if as_json:
        _print_json({"margins": verdict.VERSION, "verdicts": [each.content() for each in found]})
        return
    shown = [each for each in found if name or each.verdict != "untestable"]
    rows = [
        [
            *(each.theirs[key] for key in ("slug", "method", "protocol", "dataset", "metric")),
            f"{each.theirs['value']:g} {each.theirs['unit'] or ''}".strip(),
            _ours(each),
            each.verdict,
            each.said,
        ]
        for each in shown
    ]
    if rows:
        columns = ["paper", "method", "protocol", "data", "metric", "reported", "ours", "verdict", "why"]
        _print_table(columns, rows)
        _echo("")
    counts = verdict.counts(found)
    _print_table(
        ["numbers", "verdict", "why"],
        [[number, kind, verdict.REASONS[reason]] for (kind, reason), number in counts.items()],
    )


def _ours(found: Verdict) -> str:
    """Our value beside a reported one: only of the same metric and unit."""
    if found.ours is None or found.mean is None or {"metric", "unit"} & set(found.differences or ()):
        return ""
    interval = "" if found.low is None else f" [{found.low:.2f}, {found.high:.2f}]"
    return f"{found.mean:.2f}{interval}"


@app.command()
def report(
    out: Annotated[Path | None, typer.Option(help="The folder to render to.")] = None,
    single_file: Annotated[
        Path | None, typer.Option(help="Write the front page alone into this file, to mail to someone.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Render the leaderboard as a static site, or its front page as one file."""
    from mimbench import paths, report

    if out and single_file:
        raise ConfigError("--out and --single-file are two reports", "Ask for one at a time")
    if single_file:
        page = report.single_file(paths.results(), single_file)
    else:
        page = report.report(paths.results(), out or paths.site())
    _echo(page)
    if open_:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


@app.command()
def query(
    sql: Annotated[str, typer.Argument(help="One select statement.")],
    as_json: AsJson = False,
) -> None:
    """Ask the results database, which is opened for reading only."""
    from mimbench import database, paths

    try:
        for fault in database.update(paths.results()):
            _echo(f"warning: {fault}", err=True)
    except ResultsError as fault:  # in a folder that is read-only, say, what is there can still be asked
        if not (paths.results() / database.NAME).is_file():
            raise
        _echo(f"warning: the answer may be out of date: {fault}", err=True)
    columns, rows = database.query(sql, paths.results())
    if as_json:
        _echo(json.dumps([dict(zip(columns, map(_jsonable, row), strict=True)) for row in rows], indent=2))
        return
    rounded = [[f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows]
    _print_table(columns, rounded)


def _jsonable(cell: Any) -> Any:
    """A value of the database as JSON has it: what JSON has no form for is text, and no number is null."""
    if isinstance(cell, dict):
        return {str(key): _jsonable(value) for key, value in cell.items()}
    if isinstance(cell, list | tuple):
        return [_jsonable(value) for value in cell]
    if isinstance(cell, float) and not math.isfinite(cell):
        return None
    return cell if cell is None or isinstance(cell, str | int | float) else str(cell)


@app.command()
def check(
    run_: Annotated[bool, typer.Option("--run", help="First do the runs that are missing or stale.")] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Write the baselines from today's records instead.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare recorded metrics with their baselines; exit 1 when one has left its interval."""
    from mimbench import check as regression
    from mimbench import paths

    folder = paths.results()
    if update:
        written, left_out = regression.update(folder)
        for file in written:
            _echo(file)
        for reason in left_out:
            _echo(f"left out: {reason}", err=True)
        return
    rows = regression.check(folder, run=run_)
    if not rows:
        raise ConfigError(
            f"there are no baselines in {folder / 'baselines'}",
            "'mimbench check --update' writes them from records",
        )
    if as_json:
        _print_json([dataclasses.asdict(row) for row in rows])
    else:
        columns = ["status", "method", "protocol", "data", "seeds", "metric", "value", "expected", ""]
        _print_table(
            columns,
            [
                [
                    row.status if row.status in ("ok", "stale") else row.status.upper(),
                    row.method,
                    f"{row.protocol}:{row.recipe}",
                    row.dataset,
                    row.seeds,
                    row.metric,
                    None if row.value is None else f"{row.value:.2f}",
                    None if row.low is None else f"{row.low:.2f} to {row.high:.2f}",
                    row.note,
                ]
                for row in rows
            ],
        )
    if regression.failed(rows):
        raise typer.Exit(1)


@app.command()
def score(
    file: Annotated[Path, typer.Argument(help="An .npz with train, train_labels, test and test_labels.")],
    protocol: Annotated[str, typer.Option("--protocol", "-p", help="knn, linear, or both.")] = "knn,linear",
    set_: Settings = [],  # noqa: B006
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score features that were computed elsewhere; exit 1 when reference predictions in the file differ."""
    from mimbench import runner
    from mimbench import score as scoring
    from mimbench.progress import Progress

    found, agreements = scoring.score(
        file, _names(protocol), set_, device=runner.choose_device(device), progress=Progress(quiet=quiet)
    )
    if as_json:
        content = {"scores": found, "agreement": [{**vars(a), "passed": a.passed} for a in agreements]}
        _print_json(json.loads(json.dumps(content, default=dataclasses.asdict)))
    else:
        for scored in found:
            rows = [
                [name, f"{m.value:.2f}", f"{m.low:.2f} to {m.high:.2f}", m.n]
                for name, m in scored.metrics.items()
            ]
            _print_table(
                ["metric", "value", "95 % interval", "test items"], rows, f"{scored.protocol}:{scored.recipe}"
            )
            for warning in scored.warnings:
                _echo(f"warning: {warning}", err=True)
            _echo("")
        rows = [
            [
                a.case,
                f"{a.n - a.different} of {a.n}",
                a.ties,
                f"{a.top1:.2f}",
                "" if a.objective_difference is None else f"{a.objective_difference:.1e}",
                "ok" if a.passed else "DIFFERS",
            ]
            for a in agreements
        ]
        if rows:
            columns = ["reference", "same label", "exact ties", "top1", "objective, relative difference", ""]
            _print_table(columns, rows)
    if not all(a.passed for a in agreements):
        raise typer.Exit(1)


@app.command()
def parity(
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="The method; by default the case's.")
    ] = None,
    case: Annotated[Path | None, typer.Option(help="A case, NAME.npz with NAME.json beside it.")] = None,
    cases: Annotated[
        Path | None, typer.Option(help="A folder of cases; those of present methods are run.")
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="All cases of the folder that MIMBENCH_PARITY names.")
    ] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Keep what was found in results/parity, which the report shows.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Replay golden vectors from official code through ours; exit 1 when an output differs."""
    from mimbench import parity as lab
    from mimbench import paths

    if all_ and cases is None:
        if not (named := os.environ.get("MIMBENCH_PARITY")):
            raise ConfigError("--all needs a folder of cases", "Name it in MIMBENCH_PARITY, or with --cases")
        cases = Path(named)
    if (case is None) == (cases is None):
        raise ConfigError("parity needs one of --case FILE.npz, --cases FOLDER and --all")
    files = [case] if case else lab.cases_of(cases or Path(), method)
    rows: list[list[Any]] = []
    for file in files:
        found = lab.certify(method or lab.slug_of(file), file)
        if record:
            lab.write_certificate(found, paths.results())
        for row in found.rows:
            verdict = "ok" if row.passed else "DIFFERS"
            rows.append([file.stem, row.name, f"{row.difference:.1e}", f"{row.tolerance:.1e}", verdict])
    columns = ["case", "output", "relative difference", "allowed", ""]
    if as_json:
        _print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        _print_table(columns, rows)
    if any(row[-1] != "ok" for row in rows):
        raise typer.Exit(1)


@app.command()
def weights(
    file: Annotated[Path, typer.Argument(help="A checkpoint: .safetensors, or what torch.save made.")],
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="Try these methods only; by default all.")
    ] = None,
    set_: Settings = [],  # noqa: B006
    names: Annotated[bool, typer.Option("--names", help="Show every name in the file beside ours.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find out whose weights a file holds, and how its names become ours; exit 1 when no method fits."""
    from mimbench import config, registry
    from mimbench import weights as published

    slugs = _names(method) if method else tuple(registry.methods())
    found, others = published.recognise(file, slugs, config.parse_overrides(set_))
    if as_json:
        matches = [
            {"method": m.slug, "config": config.to_dict(m.config), "whole": m.whole, "names": m.names}
            for m in found
        ]
        _print_json({"matches": matches, "others": others})
    else:
        for match in found:
            part = "all of the model" if match.whole else "the encoder"
            inside = f", behind '{match.prefix}'" if match.prefix else ""
            _echo(f"{match.slug}: {part}, {len(match.state)} tensors{inside}")
            _echo(f"  {published.command(file, match)}")
            pairs = [[theirs, ours] for ours, theirs in match.names.items()]
            shown = pairs if names else pairs[:8]
            _print_table(["in the file", "here"], shown)
            if len(pairs) > len(shown):
                _echo(f"... and {len(pairs) - len(shown)} more (--names shows all)")
        if not found:
            _echo(f"{file} fits no method. The nearest:")
            for slug, reason in list(others.items())[:3]:
                _echo(f"  {slug}: {reason}")
    if not found:
        raise typer.Exit(1)


@app.command()
def picture(
    method: Annotated[str, typer.Argument(help="The method.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")],
    preset: Annotated[str, typer.Option(help="A preset that suits small images.")] = "smoke",
    reconstructions: Annotated[
        bool, typer.Option("--reconstructions", help="Pretrain, and draw what is predicted of test images.")
    ] = False,
    dataset: DatasetName = "digits",
    set_: Settings = [],  # noqa: B006
    budget: Budget = None,
    quiet: Quiet = False,
) -> None:
    """Draw a method's views and masks on embedded images, or what it reconstructs, by the code that trains."""
    from mimbench import picture as drawing

    if out.suffix.lower() != ".png":
        raise ConfigError(f"{out} does not end in .png")
    if reconstructions:
        from mimbench import data, runner
        from mimbench.progress import Progress

        progress = Progress(quiet=quiet)
        request = runner.Request(
            (method,), dataset=dataset, preset=preset, overrides=_overrides(set_, budget)
        )
        trained = next(iter(runner.pretrain_all(request, progress)))
        drawn = drawing.reconstructions(trained.model, data.load(dataset, progress).test)
    else:
        drawn = drawing.views(method, preset)
    out.parent.mkdir(parents=True, exist_ok=True)
    drawn.save(out, optimize=True)
    _echo(out)


@app.command()
def doctor() -> None:
    """What this machine offers and where mimbench reads and writes."""
    from mimbench import paths, registry
    from mimbench.environment import environment, git

    facts = {**environment(), **git()}
    places = {
        "clone": paths.clone() or "none: installed as a wheel",
        "data": paths.data() or "MIMBENCH_DATA is not set",
        "cache": paths.cache(),
        "results": paths.results(),
        "methods": len(registry.methods()),
        "protocols": len(registry.protocols()),
    }
    _print_table(["", ""], [[name, value] for name, value in {**places, **facts}.items()])


@data_app.command("get")
def data_get(name: Annotated[str, typer.Argument(help="The data set.")]) -> None:
    """Find a data set, or download it where that is possible, and print where it is."""
    from mimbench import data

    _echo(data.get(name))


@data_app.command("verify")
def data_verify(
    place: Annotated[str, typer.Argument(help="A data set or place.")], quiet: Quiet = False
) -> None:
    """Read every image; exit 1 and say what is wrong when something is."""
    from mimbench import data
    from mimbench.progress import Progress

    findings = data.verify(place, Progress(quiet=quiet))
    for finding in findings:
        _echo(finding)
    if findings:
        raise typer.Exit(1)
    _echo(f"{place}: every image reads, nothing is wrong")


@new_app.command("method")
def new_method(
    slug: Annotated[str, typer.Argument(help="The folder's name: lower-case letters, digits and _.")],
    title: Annotated[str, typer.Option(help="The paper's title.")],
    arxiv: Annotated[str, typer.Option(help="The paper's arXiv id, such as 2111.06377.")],
) -> None:
    """Write a folder for a new method that runs and passes the tests, to be turned into the paper."""
    from mimbench import scaffold

    for file in scaffold.new_method(slug, title, arxiv):
        _echo(file)
