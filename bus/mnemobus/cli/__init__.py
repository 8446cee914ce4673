"""The command line: the commands and their options. Each command's work is in a module of its own.

Exit status: 0, success; 1, it failed or found a problem; 2, wrong call or wrong settings; 130, Ctrl-C.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .. import __version__
from ..errors import MnemobusError, SettingsError

app = typer.Typer(
    name="mnemobus",
    help="The invalidation bus that keeps the memories of many AI agents coherent."
    "\n\nSettings come from the environment and from .env; env.template documents each.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for a program to read.")]


def main() -> None:
    """Run the command line of this process, and exit."""
    try:
        app(prog_name="mnemobus")
    except MnemobusError as error:
        print(f"mnemobus: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, SettingsError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"mnemobus {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    from .console import set_up_logging

    set_up_logging()


@app.command("demo")
def _demo(
    agents: Annotated[int, typer.Option(min=2, max=32, help="Agent processes.")] = 3,
    writes: Annotated[
        int, typer.Option(min=100, max=100_000, help="Records of conversation to write.")
    ] = 2_400,
    external: Annotated[
        bool,
        typer.Option(
            "--external", help="Use the Redis, database and workers that already run; kill nothing."
        ),
    ] = False,
    wait: Annotated[
        float, typer.Option(min=1, help="With --external: seconds to wait until all of them answer.")
    ] = 60.0,
    json: Json = False,
) -> None:
    """Show the whole system at work on this machine, and check its promises.

    Starts Redis and two worker processes in a temporary directory, and agents that
    hold conversations: each reads its context, writes, updates, deletes. Half way,
    the demo kills one worker. In the end every acknowledged write must be in the
    store, and every agent must see what the store has; else the exit status is 1.

    \b
    Examples:
      mnemobus demo
      mnemobus demo --agents 6 --writes 10000
      REDIS_URL=redis://redis:6379/0 mnemobus demo --external
    """
    from .demo.play import run

    raise typer.Exit(run(agents=agents, writes=writes, external=external, wait=wait, json=json))


@app.command("up")
def _up(
    processes: Annotated[
        int | None,
        typer.Option("--processes", "-p", min=1, help="Worker processes [MNEMOBUS_WORKER_PROCESSES]."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", min=1, help="Threads of each [MNEMOBUS_WORKER_THREADS].")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port for Redis, instead of REDIS_URL's.")
    ] = None,
    json: Json = False,
) -> None:
    """Run Redis and workers on this machine until Ctrl-C: all that agents need, for development.

    Redis listens where REDIS_URL says, on this machine only, and keeps its data in
    MNEMOBUS_DATA_DIR. Memories go to MNEMOBUS_DATABASE_URL: a SQLite file by
    default; PostgreSQL works as well. However this process ends, Redis and the
    workers end with it.

    \b
    Examples:
      mnemobus up
      mnemobus up --port 6390 --processes 4
      MNEMOBUS_DATABASE_URL=postgresql://me@localhost/memories mnemobus up
    """
    from .up import run

    raise typer.Exit(run(processes=processes, threads=threads, port=port, json=json))


@app.command("worker", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def _worker(
    context: typer.Context,
    processes: Annotated[
        int | None,
        typer.Option("--processes", "-p", min=1, help="Worker processes [MNEMOBUS_WORKER_PROCESSES]."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", min=1, help="Threads of each [MNEMOBUS_WORKER_THREADS].")
    ] = None,
) -> None:
    """Run the worker pool: Dramatiq's own command line, with the settings. It takes Dramatiq's other options, too.

    It exits when one of its processes dies: let a service manager start it again.

    \b
    Examples:
      mnemobus worker
      mnemobus worker --processes 4 --threads 8
      mnemobus worker --log-file workers.log
    """
    from .worker import run

    run(processes=processes, threads=threads, extra=context.args)


@app.command("import")
def _import(
    file: Annotated[
        str,
        typer.Argument(help="A file with one JSON object per line; - for standard input.", metavar="FILE"),
    ],
    on_error: Annotated[
        str, typer.Option(help="stop at the first bad line, or skip bad lines.", metavar="[stop|skip]")
    ] = "stop",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also write lines whose memory is stored with other content.")
    ] = False,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait/--no-wait", help="Wait until the store has everything, or only until the log has it."
        ),
    ] = True,
    json: Json = False,
) -> None:
    """Import memories from a file, one JSON object per line.

    table, room and content are required; id, agent, entity, world, metadata,
    embedding and created_at are optional.

    You can stop it at any time and run it again: it skips a line whose memory is
    already stored. If the stored memory differs (it was updated since), it stays as
    it is, unless you give --overwrite. A memory that was deleted since is imported
    again. A line without an id gets one that is computed from its content: the same
    line is always the same memory. Lines with equal dates and without ids keep the
    order of the file.

    The file may be compressed by gzip. The command names each bad line, with its
    number and the reason; the exit status is 1 if there were any.

    \b
    Examples:
      mnemobus import conversations.jsonl
      mnemobus import --on-error skip big.jsonl
      jq -c '.[]' array.json | mnemobus import -
    """
    if on_error not in ("stop", "skip"):
        raise typer.BadParameter(f"{on_error!r} is neither 'stop' nor 'skip'.", param_hint="--on-error")
    from .importing import run

    raise typer.Exit(run(file=file, skip=on_error == "skip", overwrite=overwrite, wait=wait, json=json))


@app.command("stats")
def _stats(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh the figures until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="With --watch: seconds between two refreshes.")] = 2.0,
    json: Json = False,
) -> None:
    """Show figures of the log, the workers, the feed, Redis and the store.

    \b
    Examples:
      mnemobus stats
      mnemobus stats --watch
      mnemobus stats --json | jq .backlog
    """
    from .stats import run

    raise typer.Exit(run(watch=every if watch else None, json=json))


@app.command("tail")
def _tail(
    events: Annotated[bool, typer.Option("--events", help="Only writes.")] = False,
    invalidations: Annotated[bool, typer.Option("--invalidations", help="Only invalidations.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Show writes as they are announced to agents with live scopes.")
    ] = False,
    since: Annotated[
        str | None,
        typer.Option(
            help="Begin there: 90s, 15m, 2h or 1d ago, a date with a zone, or a stream ID.", metavar="WHEN"
        ),
    ] = None,
    count: Annotated[int | None, typer.Option("--count", "-n", min=1, help="Stop after this many.")] = None,
    json: Json = False,
) -> None:
    """Show writes and invalidations as they pass. The workers still get all of them.

    \b
    Examples:
      mnemobus tail
      mnemobus tail --events --since 10m
      mnemobus tail --invalidations --json --count 100
      mnemobus tail --live
    """
    from .tail import run

    if live and (events or invalidations or since is not None):
        raise typer.BadParameter(
            "announcements are not kept, so --live begins now and shows them alone: leave out --events,"
            " --invalidations and --since"
        )
    both = events == invalidations
    raise typer.Exit(
        run(
            events=events or both,
            invalidations=invalidations or both,
            live=live,
            since=since,
            count=count,
            json=json,
        )
    )


@app.command("verify")
def _verify(
    seconds: Annotated[
        float, typer.Option(min=0, help="How long to watch; the command ends about 10 s later.", metavar="N")
    ] = 60.0,
    marks: Annotated[str, typer.Option(hidden=True)] = "1,5,10",
    patience: Annotated[float, typer.Option(hidden=True, min=0)] = 2.0,
    json: Json = False,
) -> None:
    """Ask every agent, 1, 5 and 10 s after a write, whether it still holds an older copy.

    It watches the feed, follows a sample of the invalidated scopes, and compares
    the copy that each agent would serve with what the store had at the
    invalidation. It prints the share of consistent answers after each time. An
    agent that does not answer counts as silent, not as consistent. The command
    writes nothing: run it while agents work.

    The exit status is 1 if any agent held an older copy at 10 s, or was silent
    then, or if Redis or the store was away and nothing could be verified. Ctrl-C
    ends it with the figures so far.

    \b
    Examples:
      mnemobus verify
      mnemobus verify --seconds 600 --json
    """
    try:
        seconds_of_marks = [float(mark) for mark in marks.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{marks!r} are not seconds.", param_hint="--marks") from None
    from .verify import run

    raise typer.Exit(run(seconds=seconds, json=json, marks=seconds_of_marks, patience=patience))


@app.command("replay")
def _replay(
    since: Annotated[
        str | None,
        typer.Option(
            help="Begin there: 90s, 15m, 2h or 1d ago, a date with a zone, or a version. Without it, where the log"
            " begins.",
            metavar="WHEN",
        ),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(help="End there, inclusive. Without it, where the log ends now.", metavar="WHEN"),
    ] = None,
    partition: Annotated[
        list[int] | None, typer.Option(min=0, help="Only this log partition; may be repeated.", metavar="N")
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(
            help="Apply to this store instead of the bus's own. It is made if it does not exist.",
            metavar="DATABASE_URL",
        ),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Go on even if the log no longer reaches back to --since.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only count what would be applied; change nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Apply part of the log again: after a database was restored, or to build another one.

    You can run it at any time and as often as you like, while agents and workers go
    on: an event that the store already has changes nothing. If a memory changes,
    every cache drops its copies. Dead letters are left out.

    You can stop it at any time; to go on, run the same command again.

    The exit status is 1 if the log no longer reaches back to --since (unless you
    give --partial), or if an event that is not a dead letter can't be applied.

    \b
    Examples:
      mnemobus replay --since 2h
      mnemobus replay --since 2025-06-01T12:00:00Z --dry-run
      mnemobus replay --into sqlite:///copy.db
    """
    from .replay import run

    raise typer.Exit(
        run(
            since=since,
            until=until,
            partitions=partition or [],
            into=into,
            partial=partial,
            dry_run=dry_run,
            json=json,
        )
    )


_dead = typer.Typer(
    no_args_is_help=True,
    help="The writes that no worker could apply: list, show, requeue or drop them.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(_dead, name="dead")

PartitionOption = Annotated[
    int | None,
    typer.Option(min=0, help="Only this log partition: two may have the same version.", metavar="N"),
]
VersionsArgument = Annotated[
    list[str] | None, typer.Argument(help="As `mnemobus dead list` shows them.", metavar="VERSION...")
]
All = Annotated[bool, typer.Option("--all", help="All dead letters.")]


@_dead.command("list")
def _dead_list(partition: PartitionOption = None, json: Json = False) -> None:
    """List the dead letters: version, date, operation, table, room, id and reason.

    \b
    Examples:
      mnemobus dead list
      mnemobus dead list --json | jq .reason
    """
    from .dead import list_all

    raise typer.Exit(list_all(partition=partition, json=json))


@_dead.command("show")
def _dead_show(
    version: Annotated[str, typer.Argument(help="As `mnemobus dead list` shows it.")],
    partition: PartitionOption = None,
    json: Json = False,
) -> None:
    """Show a dead letter in full; in place of an embedding, the number of its floats.

    \b
    Examples:
      mnemobus dead show 1795474760976-0
    """
    from .dead import show

    raise typer.Exit(show(version=version, partition=partition, json=json))


@_dead.command("requeue")
def _dead_requeue(
    versions: VersionsArgument = None,
    everything: All = False,
    partition: PartitionOption = None,
    json: Json = False,
) -> None:
    """Put dead letters back into the log. Workers then try them again; remove the cause first.

    Each keeps its version, so it can't undo later writes. One that fails again
    becomes a dead letter again.

    \b
    Examples:
      mnemobus dead requeue 1795474760976-0 1795474760976-1
      mnemobus dead requeue --all
    """
    from .dead import requeue

    raise typer.Exit(requeue(versions=versions or [], everything=everything, partition=partition, json=json))


@_dead.command("drop")
def _dead_drop(
    versions: VersionsArgument = None,
    everything: All = False,
    partition: PartitionOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    json: Json = False,
) -> None:
    """Remove dead letters: their writes are lost. Asks first.

    \b
    Examples:
      mnemobus dead drop 1795474760976-0
      mnemobus dead drop --all --yes
    """
    from .dead import drop

    raise typer.Exit(
        drop(versions=versions or [], everything=everything, partition=partition, yes=yes, json=json)
    )


@app.command("repartition")
def _repartition(
    partitions: Annotated[
        int, typer.Argument(min=1, max=1024, help="The new number of log partitions.", metavar="N")
    ],
    timeout: Annotated[float, typer.Option(min=0, help="Give up after this time.", metavar="SECONDS")] = 60.0,
    pause: Annotated[
        float, typer.Option(min=0, help="The longest time that writes may wait.", metavar="SECONDS")
    ] = 5.0,
    force: Annotated[
        bool, typer.Option("--force", help="Also if agents of an older version are connected.")
    ] = False,
    json: Json = False,
) -> None:
    """Change the number of log partitions, while agents and workers go on.

    Writes wait until workers have applied all events of the log; this usually takes
    a fraction of a second. Then the log goes on in new partitions. Agents and
    workers follow by themselves: you need not set or restart anything. All writes
    keep their order.

    If the command fails, or is stopped or killed, the log goes on as before, after
    at most five seconds; run the same command again.

    The exit status is 1 if the change is not possible now: no worker runs, agents
    or workers of an older version are connected, or workers take too long.

    \b
    Examples:
      mnemobus repartition 1
      mnemobus repartition 8 --pause 30 --timeout 300
    """
    from .repartition import run

    raise typer.Exit(run(partitions=partitions, timeout=timeout, pause=pause, force=force, json=json))


@app.command("adopt")
def _adopt(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False, json: Json = False
) -> None:
    """Make the database of MNEMOBUS_DATABASE_URL, as it is, the store of this bus. Asks first.

    A bus has one store, and a store has one bus; any other pair is refused. With
    this command you confirm an intended change: the bus moves to another database,
    another bus (a new REDIS_KEY_PREFIX, another Redis) takes over this database, or
    you accept that this database has lost data.

    Stop all agents and workers first. Workers that start afterwards apply the
    events that the store may lack, as far as the log still has them.

    \b
    Examples:
      mnemobus adopt
      MNEMOBUS_DATABASE_URL=postgresql://me@new/memories mnemobus adopt --yes
    """
    from .adopt import run

    raise typer.Exit(run(yes=yes, json=json))


@app.command("doctor")
def _doctor(json: Json = False) -> None:
    """Check Redis, the store and the workers. For each problem, say what to do.

    The exit status is 1 if any check fails; a warning is not a failure.

    \b
    Examples:
      mnemobus doctor
      mnemobus doctor --json
    """
    from .doctor import run

    raise typer.Exit(run(json=json))


__all__ = ["app", "main"]
