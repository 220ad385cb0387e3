"""The command `rlstab`. What a subcommand needs is imported when it runs, so that help is fast."""

import inspect
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

import rlstab
from rlstab.errors import (
    ConfigError,
    HostError,
    RecipeError,
    RecordError,
    RewardError,
    RlstabError,
    WeightSyncError,
)

__all__ = ["main"]

MISTAKE, FAILURE, INTERRUPTED = 2, 1, 130
UNREADABLE = 3
#: What the recipe, the arguments or the rewards that a recipe names are to blame for.
MISTAKES = (ConfigError, RecordError, HostError, RewardError)
WIDTH_OF_A_FILE = 160

TRAIN_FLAGS = ("--help", "--list-keys", "--dry-run", "--resume")
TRAIN_HELP = """\
Train as a recipe says. Every key of the recipe can be overridden by its dotted path, as in
--trainer.learning_rate=1e-4, --objective.terms.drift.coef=0.1 or --output runs/a; values are YAML.
The keys of a recipe are model, task, rewards, environment, objective, advantage, engine, replay, gradients, optimizer,
supervised, buffer, demonstrations, guidance, teachers, reset, resample, adapter, warmup, evaluation, signals, watch,
trainer, prompts, output, seed and threads;
--list-keys lists what stands below them. `base: other.yaml` takes over another recipe, which the rest of the file
changes."""

DIAGNOSE_HELP = """\
Say what is wrong with a run, why, how sure that is, and what to change; of any origin. Exit code: 0 healthy, 1 warning,
2 collapsed, 3 could not be read."""

BUFFER_HELP = """\
Sample every training prompt of a recipe with the policy that its training starts from, warm-up included, and keep one
right completion of each prompt that is solved nearly always, with its log-probs. A recipe reads the folder with
buffer.path; without, `rlstab train` builds the buffer itself."""

CHECK_HELP = """\
Load a model on both sides, as the trainer has it and into a rollout engine, sample, and print how far their log-probs
are apart. Exit code: 0 they agree, 1 they do not, 2 the check could not run."""
SERVE_HELP = """\
Serve a model to VLLMServerEngine with vLLM, on a GPU or a CPU, with the arguments that make it agree with a trainer.
Each route, vLLM's own included, asks for the key in RLSTAB_SERVER_KEY or --key-file, if there is one. Runs until it is
ended; exit code 1 if vLLM dies or hangs."""
KEY_FILE_HELP = "file with the server's key, instead of RLSTAB_SERVER_KEY"
DTYPES = ["float32", "bfloat16", "float16"]
CHECK_COLUMNS = {
    "tokens": "tokens",
    "mean_abs": "mean |Δ|",
    "k1": "k1",
    "k3": "k3",
    "max_abs": "max |Δ|",
    "f2": "F(2)",
    "ess_token": "ESS/token",
    "ess_sequence": "ESS/sequence",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; those of the process if not given.

    Returns:
        The exit code: 0, 2 for a mistake in the arguments, the recipe or its rewards, 1 for another failure, 130 after
        Ctrl-C.
        `diagnose` returns 0 for a healthy run, 1 for a warning, 2 for a collapse, 3 for a run that cannot be read;
        `check` 0 for agreement, 1 for a mismatch, 2 if it could not run.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    overrides: list[tuple[str, str]] = []
    try:
        if words[:1] == ["train"]:
            words, overrides = _split_overrides(words)
        chosen = _parser().parse_args(words or ["--help"])
        if chosen.command == "train":
            return _train(overrides=overrides, **vars(chosen.train))
        if chosen.command == "diagnose":
            return _diagnose(**vars(chosen.diagnose))
        if chosen.command == "watch":
            return _watch(chosen.watch.run)
        if chosen.command == "buffer":
            return _buffer(chosen.buffer.recipe, chosen.buffer.output)
        if chosen.command == "check":
            return _check(chosen.check)
        if chosen.command == "serve":
            return _serve(**vars(chosen.serve))
        return _report(**vars(chosen.report)) if chosen.command == "report" else _methods()
    except ArgumentError as error:
        return _fail(" ".join(str(error).split()), MISTAKE)
    except RlstabError as error:
        return _fail(str(error), MISTAKE if isinstance(error, MISTAKES) else FAILURE)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)


def _fail(message: str, code: int) -> int:
    print(f"rlstab: {message}", file=sys.stderr)
    return code


def _train_parser() -> ArgumentParser:
    parser = ArgumentParser(description=TRAIN_HELP)
    parser.add_argument("recipe", type=str, nargs="?", help="YAML file")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the recipe's output")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the recipe, print it resolved and what it will do"
    )
    parser.add_argument("--list-keys", action="store_true", help="list the keys of a recipe, and stop")
    return parser


def _report_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Write plots and report.html of a run anew, and print the table before → after. Several runs are "
        "compared with the first, on one page; runs of any origin will do."
    )
    parser.add_argument("runs", type=str, nargs="+", help="run folder, or what `rlstab diagnose` reads")
    parser.add_argument("--output", type=str | None, default=None, help="page to write (report.html of a run folder)")
    return parser


def _diagnose_parser() -> ArgumentParser:
    parser = ArgumentParser(description=DIAGNOSE_HELP)
    parser.add_argument(
        "run", type=str, help="run folder, trainer_state.json, .csv, .jsonl, TensorBoard, wandb, trackio"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--fix", type=str | None, default=None, help="write the recipe with the first cause's changes")
    parser.add_argument("--columns", type=dict[str, str], default={}, help="of a table: {train/reward: my_column}")
    parser.add_argument("--name", type=str | None, default=None, help="which run of a store that holds several")
    return parser


def _watch_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Show a run in the terminal while it runs, or after. Needs the extra `watch`.")
    parser.add_argument("run", type=str, help="run folder")
    return parser


def _check_parser() -> ArgumentParser:
    parser = ArgumentParser(description=CHECK_HELP)
    parser.add_argument("model", type=str, help="folder or name of a checkpoint")
    parser.add_argument("--engine", choices=["vllm", "server", "transformers"], default="vllm", help="what samples")
    parser.add_argument("--url", type=str | None, default=None, help="of a running server; by default one is started")
    parser.add_argument("--key-file", type=str | None, default=None, help=KEY_FILE_HELP)
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="precision of the trainer; the checkpoint's")
    parser.add_argument("--engine-dtype", choices=DTYPES, default=None, help="precision of the engine; the trainer's")
    parser.add_argument("--arguments", type=dict, default={}, help="arguments of vLLM, as in '{max_model_len: 512}'")
    parser.add_argument("--temperature", type=float, default=1.0, help="temperature to sample at")
    parser.add_argument("--tokens", type=int, default=64, help="longest completion; 64 are sampled")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and samples")
    return parser


def _serve_parser() -> ArgumentParser:
    parser = ArgumentParser(description=SERVE_HELP)
    parser.add_argument("model", type=str, help="folder or name of a checkpoint")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to bind; any other needs a key")
    parser.add_argument("--port", type=int, default=8000, help="port to bind; 0 takes a free one")
    parser.add_argument("--key-file", type=str | None, default=None, help=KEY_FILE_HELP)
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="precision to sample in; the checkpoint's")
    parser.add_argument("--transfer", choices=["file", "nccl"], default="file", help="how new weights come")
    parser.add_argument("--in-flight", choices=["keep", "wait", "abort"], default="keep", help="requests at a sync")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds without a token until it ends itself")
    parser.add_argument("--kept-limit", type=int, default=1024, help="most tokens recorded of a kept set")
    parser.add_argument("--routes", type=bool, default=False, help="return the experts that every token went to")
    parser.add_argument("--repair", type=bool, default=True, help="of what vLLM's CPU backend leaves stale")
    parser.add_argument("--arguments", type=dict, default={}, help="arguments of vLLM, as in '{max_model_len: 512}'")
    return parser


def _buffer_parser() -> ArgumentParser:
    parser = ArgumentParser(description=BUFFER_HELP)
    parser.add_argument("recipe", type=str, help="YAML file, with the key `buffer`")
    parser.add_argument("--output", type=str, required=True, help="folder of the buffer")
    return parser


def _methods_parser() -> ArgumentParser:
    return ArgumentParser(description="List the parts of an objective and the presets, with their papers.")


COMMANDS = {
    "train": (_train_parser, "train as a recipe says"),
    "report": (_report_parser, "write the report of a run anew"),
    "diagnose": (_diagnose_parser, "say what is wrong with a run, and why"),
    "watch": (_watch_parser, "show a run in the terminal, live"),
    "check": (_check_parser, "compare a rollout engine with the trainer's model"),
    "serve": (_serve_parser, "serve a model to trainers, with vLLM"),
    "buffer": (_buffer_parser, "sample what the policy does well before it is trained"),
    "methods": (_methods_parser, "list parts, presets and their papers"),
}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="rlstab",
        version=rlstab.__version__,
        description=rlstab.__doc__,
        exit_on_error=False,
    )
    commands = parser.add_subcommands(dest="command")
    for name, (of, says) in COMMANDS.items():
        commands.add_subcommand(name, of(), help=says)
    return parser


def _split_overrides(words: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Separate what the command takes itself from overrides of the recipe, `--key=value` or `--key value`."""
    own: list[str] = []
    overrides: list[tuple[str, str]] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("--") or word in TRAIN_FLAGS:
            own.append(word)
            continue
        key, given, value = word.removeprefix("--").partition("=")
        if not given:
            value = next(rest, "--")
        if value.startswith("--"):
            raise RecipeError(
                f"--{key} has no value: pass --{key}=VALUE for a key of the recipe (flags: {', '.join(TRAIN_FLAGS)})"
            )
        overrides.append((key, value))
    return own, overrides


def _train(
    recipe: str | None, *, overrides: Sequence[tuple[str, str]], resume: bool, dry_run: bool, list_keys: bool
) -> int:
    from rich.console import Console
    from transformers.utils import logging

    from rlstab.recipes import plan_recipe, read_recipe, recipe_parser, run_recipe

    if list_keys:
        recipe_parser().print_help()
        return 0
    if recipe is None:
        raise RecipeError("rlstab train: no recipe given, as in: rlstab train configs/quickstart.yaml")
    read = read_recipe(recipe, overrides, resume=resume)
    if dry_run:
        plan = plan_recipe(read)
        if os.environ.get("RANK", "0") == "0":
            print(read.text)
            plan.show(Console())
        return 0
    logging.disable_progress_bar()  # the run shows its own
    outcome = run_recipe(read, resume=resume)
    return INTERRUPTED if outcome.interrupted else 0


def _buffer(recipe: str, output: str) -> int:
    from transformers.utils import logging

    from rlstab.recipes import build_recipe_buffer, read_recipe

    logging.disable_progress_bar()
    built = build_recipe_buffer(read_recipe(recipe, [("output", output)]).recipe)
    built.save(output)
    print(
        f"{output}: {len(built.near_perfect)} of {len(built.solved)} prompts are near perfect and have a completion "
        f"each, {len(built.exploration)} are left to explore"
    )
    return 0


def _report(runs: Sequence[str], *, output: str | None) -> int:
    from pathlib import Path

    from rich.console import Console

    from rlstab.record import Run, RunFolder, read_run
    from rlstab.report import print_summary, write_page, write_plots

    console = Console()
    if len(runs) == 1 and output is None and (Path(runs[0]) / "config.yaml").is_file():
        folder = RunFolder.open(runs[0])
        read = Run.of(folder)
        write_plots(folder, read)
        page = write_page([read], folder.report)
        print_summary(read, console)
    else:
        page = write_page([read_run(run) for run in runs], output or "report.html")
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return 0


def _diagnose(run: str, *, json: bool, fix: str | None, columns: Mapping[str, str], name: str | None) -> int:
    from rich.console import Console

    from rlstab.record import diagnosis_of, read_run
    from rlstab.report import as_json, print_diagnosis, write_fix

    try:
        read = read_run(run, columns=columns, name=name)
    except RecordError as error:
        return _fail(str(error), UNREADABLE)
    if not read.known_signals:
        remedy = "wait for the first step" if read.last_step is None else "name some: --columns '{train/reward: NAME}'"
        return _fail(f"{run} ({read.source}) holds no signal that could be diagnosed: {remedy}", UNREADABLE)
    diagnosis = diagnosis_of(read)
    if json:
        print(as_json(read, diagnosis))
    else:
        print_diagnosis(read, diagnosis, Console(highlight=False, soft_wrap=False))
    if fix is not None:
        done = write_fix(read, diagnosis, fix)
        print(f"{fix}: {', '.join(done)}" if done else f"{fix}: nothing to change", file=sys.stderr)
    return diagnosis.exit_code


def _watch(run: str) -> int:
    from rlstab.record import RunFolder
    from rlstab.report import watch_run

    watch_run(RunFolder.open(run))
    return 0


def _check(options: Any) -> int:
    try:
        return _run_check(options)
    except WeightSyncError as error:
        return _fail(f"mismatch: {error}", FAILURE)
    except (RlstabError, OSError, RuntimeError, ValueError, ImportError) as error:
        return _fail(f"check could not run: {' '.join(str(error).split())}", MISTAKE)


def _run_check(options: Any) -> int:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from rlstab.rollouts import check_engine

    logging.disable_progress_bar()
    dtype, engine_dtype = (vars(torch)[name] if name else None for name in (options.dtype, options.engine_dtype))
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype or "auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with _checked_engine(options, model, tokenizer, engine_dtype) as engine:
        found = check_engine(engine, model, temperature=options.temperature, tokens=options.tokens, seed=options.seed)
    _print_check(found, f"{options.engine} in {engine.dtype}, trainer in {model.dtype}")
    return 0 if found.agrees else FAILURE


@contextmanager
def _checked_engine(options: Any, model: Any, tokenizer: Any, dtype: Any) -> Iterator[Any]:
    """The engine to check, with a server of its own if it needs one."""
    from rlstab.rollouts import ServerProcess, TransformersEngine, VLLMEngine, VLLMServerEngine
    from rlstab.routing import is_mixture

    routes = is_mixture(model)
    arguments = {"max_model_len": options.tokens + 16, **options.arguments}
    with ExitStack() as stack:
        if options.engine == "transformers":
            engine: Any = TransformersEngine(model, tokenizer, share=False, dtype=dtype, routes=routes)
        elif options.engine == "vllm":
            engine = VLLMEngine(model, tokenizer, dtype=dtype, arguments=arguments, routes=routes)
        else:
            url = options.url
            if url is None:
                server = ServerProcess(options.model, dtype=dtype or model.dtype, arguments=arguments)
                url = stack.enter_context(server).url
            engine = VLLMServerEngine(model, tokenizer, url=url, key_file=options.key_file)
        yield stack.enter_context(engine)


def _serve(model: str, *, key_file: str | None, dtype: str | None, **settings: Any) -> int:
    import torch

    from rlstab.rollouts import ServerKey, ServerSettings, serve

    precision = None if dtype is None else vars(torch)[dtype]
    serve(model, ServerSettings(key=ServerKey.read(key_file), dtype=precision, **settings))
    return 0


def _print_check(found: Any, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("tokens with probability", *CHECK_COLUMNS.values(), title=title, box=None, title_justify="left")
    rows = {f"{low:g} to {high:g}": row for (low, high), row in found.buckets.items()} | {"all": found.total}
    for name, row in rows.items():
        table.add_row(name, *[f"{row[key]:.3g}" for key in CHECK_COLUMNS])
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    console.print(table, highlight=False)
    if found.routes:
        shares = ", ".join(f"{layer}: {share:.2%}" for layer, share in found.routes.items())
        console.print(f"same experts in the trainer, by layer: {shares}", highlight=False)
    if found.agrees:
        console.print("agreement: the engine samples from the trainer's model, and follows its weights")
        return
    remedy = (
        "look for what differs: precision of a part of the model, kernels, arguments of the engine"
        if found.exact
        else "sample in the trainer's precision (--engine-dtype), or correct for it: TruncatedIS, or another weight on "
        "the sampler's log-probs"
    )
    console.print(f"mismatch: the engine samples from another distribution than the trainer believes in; {remedy}")


def _methods() -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from rlstab.losses import method_of

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_OF_A_FILE)
    for kind, parts in _parts().items():
        table = Table(title=kind, title_justify="left", title_style="bold", box=None, show_header=False, expand=True)
        for ratio in (2, 5, 5):
            table.add_column(ratio=ratio, overflow="fold")
        for name, part in parts.items():
            table.add_row(f"[cyan]{name}[/]", escape(_says(part)), escape(method_of(part).reference))
        console.print(table, highlight=False)
    return 0


def _parts() -> dict[str, dict[str, Any]]:
    """Everything public that an objective can be made of, and what steadies the update, by kind and name."""
    from rlstab import losses, optim
    from rlstab.losses import method_of, presets

    public = {name: vars(losses)[name] for name in losses.__all__}
    built = {name: part for name, part in public.items() if inspect.isclass(part) and not inspect.isabstract(part)}
    kinds: dict[str, dict[str, Any]] = {"presets": {name: vars(presets)[name] for name in presets.__all__}}
    for kind, base in {
        "surrogates": losses.Surrogate,
        "divergences": losses.Divergence,
        "other regularisers": losses.Term,
        "ratios": losses.Ratio,
        "weights and masks": losses.Weight,
        "advantages": losses.Advantage,
        "rollout parts and step statistics": losses.Prepared,
        "coefficients": losses.Controller,
    }.items():
        kinds[kind] = {name: part for name, part in built.items() if issubclass(part, base)}
        built = {name: part for name, part in built.items() if name not in kinds[kind]}
    steady = {name: vars(optim)[name] for name in optim.__all__}
    kinds["gradient and optimizer"] = {name: part for name, part in steady.items() if method_of(part).stabilises}
    return kinds


def _says(part: Any) -> str:
    """The first line of a docstring, without the formula that ends it, and what the method stabilises."""
    from rlstab.losses import method_of

    method = method_of(part)
    line = method.says.partition(": $")[0].rstrip(".")
    return f"{line} (stabilises: {method.stabilises})" if method.stabilises else line
