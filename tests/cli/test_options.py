"""One option, one meaning: every option of every command, by introspection; and the names of 0.1."""

from __future__ import annotations

from collections import defaultdict

import click
import pytest
from click.testing import CliRunner

from mlx_rsgwm.cli.commands import COMMANDS
from mlx_rsgwm.cli.groups import find_command
from mlx_rsgwm.cli.main import rsgwm
from mlx_rsgwm.cli.old_names import EXPERIMENTS, OPTIONS_BEFORE, with_new_names
from mlx_rsgwm.cli.options.kinds import AUTO_SHARE, Number, OneOf, Whole
from mlx_rsgwm.cli.reference import option_table, stem
from mlx_rsgwm.core.errors import RsgwmError

# Two names of one thing are refused: each of these is said by another option, in all commands.
SYNONYMS = {
    *(
        "--train-data",  # --data is rows to judge an adapter by
        "--dataset",
        "--limit",
        "--number",
        "--count",
        "--eval",
        "--tasks",
        "--from",
        "--adapters",
    ),
    *("--output", "--out-dir", "--dest", "--certificate-out", "--model", "--base-model", "--batch", "--rows-at-once"),
    *("--samples", "--tau", "--signal", "--k", "--max-new-tokens", "--max-length", "--as-json", "--silent"),
}


@pytest.fixture(scope="module")
def options():
    """Every option by its long name: the command and click's object, of all commands that have it."""
    return option_table()


def test_what_is_required_is_asked_for(options):
    """In every version of click: a default of None is one, to some, and the option is not asked for then."""
    asked = [(name, option) for users in options.values() for name, option in users.items() if option.required]
    assert len(asked) > 10
    for name, option in asked:
        with pytest.raises(click.MissingParameter):
            option.handle_parse_result(click.Context(find_command(name), info_name=name), {}, [])


def test_one_name_has_one_type_one_metavar_and_one_help(options):
    clashes = []
    for flag, users in options.items():
        kinds = {type(option.type) for option in users.values()}
        metavars = {option.metavar for option in users.values()}
        helps = {stem(option.help) for option in users.values()}
        flags = {option.is_flag for option in users.values()}
        clashes += [f"{flag}: {kinds or metavars} {metavars} {helps}"] * (
            max(map(len, (kinds, metavars, helps, flags))) > 1
        )
    assert clashes == []


def test_a_closed_set_is_the_same_everywhere_or_a_part_of_it(options):
    for flag, users in options.items():
        sets = [set(option.type.choices) for option in users.values() if isinstance(option.type, click.Choice)]
        assert all(choices <= max(sets, key=len) for choices in sets), flag
        assert all(isinstance(option.type, OneOf) for option in users.values() if isinstance(option.type, click.Choice))


def test_every_option_says_what_it_is(options):
    assert [(flag, name) for flag, users in options.items() for name, option in users.items() if not option.help] == []


def test_no_two_names_for_one_thing(options):
    assert SYNONYMS & options.keys() == set()
    stems = defaultdict(set)
    for flag, users in options.items():
        stems[stem(next(iter(users.values())).help)].add(flag)
    assert {text: flags for text, flags in stems.items() if len(flags) > 1} == {}


def test_numbers_have_ranges(options):
    """What may be any number at all is listed here."""
    anything = {"--weight", "--scale"}
    free = {
        flag for flag, users in options.items() for option in users.values() if getattr(option.type, "min", 0) is None
    }
    assert free == anything
    plain = (click.types.IntParamType, click.types.FloatParamType)
    types = {type(option.type) for users in options.values() for option in users.values()}
    assert {kind for kind in types if issubclass(kind, plain)} == {Whole, Number}  # finite, and no larger than arrays


def test_what_is_written_is_named_by_out(options):
    assert {tuple(option.opts) for option in options["--out"].values()} == {("--out", "-o")}


def test_every_command_that_needs_a_base_takes_the_adapters(options):
    for name, option in options["--base"].items():
        assert not option.required, name
        assert "[default: the adapter" in option.help or name in (
            "train",
            "pool train",
            "recipe init",
            "convert from-peft",
        ), name


@pytest.mark.parametrize("command", OPTIONS_BEFORE)
def test_options_of_0_1_are_told_what_they_are_called_now(command):
    known = {flag for parameter in find_command(command).params for flag in parameter.opts}
    for before, now in OPTIONS_BEFORE[command].items():
        assert before not in known
        flag, _, prefix = now.partition(" ")
        assert flag in known
        for words in ([before, "VALUE"], [f"{before}=VALUE"]):
            arguments, notes = with_new_names([*command.split(), *words, "--json"])
            expected = [flag, f"{prefix}VALUE"] if prefix or len(words) == 2 else [f"{flag}=VALUE"]
            assert arguments == [*command.split(), *expected, "--json"]
            assert notes == [f"note: `{before}` is now `{now}`; the old name goes with the next release"]


def test_values_after_two_dashes_are_nobodys_options():
    assert with_new_names(["merge", "a", "--", "--tau"]) == (["merge", "a", "--", "--tau"], [])


@pytest.mark.parametrize(
    ("command", "before", "value", "flag"),
    [
        ("data negatives", "--questions", "100", "--items"),
        ("data negatives", "--questions", "sets", "--questions"),
        ("eval", "--drafts", "6", "--draft-count"),
        ("eval", "--drafts", "mixed", "--drafts"),
        ("calibrate", "--drafts", "held.jsonl", "--drafts-file"),
        ("calibrate", "--drafts", "grafted", "--drafts"),
    ],
)
def test_what_a_name_meant_before_is_told_by_its_value(command, before, value, flag):
    for words in ([before, value], [f"{before}={value}"]):
        arguments, notes = with_new_names([*command.split(), *words])
        assert arguments == [*command.split(), flag, value]
        assert len(notes) == (flag != before)


def test_experiments_are_out_of_ask():
    shown = CliRunner().invoke(rsgwm, ["ask", "--help"]).stdout
    for flag in EXPERIMENTS:
        assert flag not in shown
        assert flag in CliRunner().invoke(rsgwm, ["eval", "--help"]).stdout
        assert with_new_names(["ask", "x", flag, "y"])[1] == [
            f"note: {flag} leaves `rsgwm ask` with the next release; `rsgwm eval` keeps it"
        ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fuse", "a", "b"], "note: `OUT` as an argument, `b` is now `--out b`"),
        (["fuse", "a"], "missing option --out"),
        (["fuse", "a", "b", "--out", "c"], "got b beside --out c"),
        (["hub", "pull", "me/x", "y", "--keep-peft", "--strict"], "is now `--out y`"),
        (["adapter", "loss", "nowhere"], "is now `--corpus nowhere`"),
        (["merge", "a", "b", "--method", "tise", "--out", "c"], "did you mean 'ties'?"),
        (["ask", "q", "--score", "combine"], "did you mean 'combined'?"),
        (["eval", "--task", "x", "--threshold", "1.5"], "1.5 is not in [0, 1]"),
        (["run", "demo", "--out", "x", "--set", "rank"], "wants NAME=VALUE, found 'rank'"),
    ],
)
def test_what_is_told(arguments, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(rsgwm, arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_defaults_of_slow_imports_are_written_twice_and_equal():
    from mlx_rsgwm.cli.options import shared, train
    from mlx_rsgwm.inference.sampling import Sampling
    from mlx_rsgwm.training.checkpoints import Saving

    sampling = (Sampling.temperature, Sampling.top_p, Sampling.max_tokens)
    assert sampling == (shared.TEMPERATURE, shared.TOP_P, shared.MAX_TOKENS)
    assert (Saving.every, Saving.keep, Saving.snapshots) == (train.SAVE_EVERY, train.KEEP, train.SNAPSHOTS)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *((kind, value) for kind in (Whole(0), Whole(1), Whole(-1)) for value in
          ("9" * 4301, "9" * 30, "2147483648", "1e9", "0x10", "1_000", "\u0663", "nan", "", "1.0", "-2", "1 2")),
        *((kind, value) for kind in (Number(), Number(0), Number(0, 1), Number(0, 1, min_open=True)) for value in
          ("nan", "NaN", "inf", "-inf", "1e400", "-1e400", "", "0x10", "1,5", "٣", "1_000",
           "１２", "½", "1e", ".", "+-1")),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused_where_they_are_read(kind, value):
    with pytest.raises(click.BadParameter) as caught:
        kind.convert(value, None, None)
    assert len(caught.value.message) < 150


@pytest.mark.parametrize("value", ["nan", "1.5", "٣", "1_000", "", "AUTO", "9" * 5000])
def test_a_threshold_is_auto_or_digits(value):
    with pytest.raises(click.BadParameter) as caught:
        AUTO_SHARE.convert(value, None, None)
    assert len(caught.value.message) < 150


def test_numbers_in_range_are_taken():
    assert [Whole(-1).convert(value, None, None) for value in ("-1", "0", " 12", "+3", "0007", "2147483647")] == [
        -1, 0, 12, 3, 7, 2**31 - 1,
    ]  # fmt: skip
    assert Whole(0, 2**32 - 1).convert(str(2**32 - 1), None, None) == 2**32 - 1
    assert [Number(0, 1).convert(value, None, None) for value in ("0", "1", ".5", "1e-320")] == [0, 1, 0.5, 1e-320]


# What shells, scripts and other people put where a value is wanted.
ODD_VALUES = [
    "", " ", "nan", "-nan", "inf", "-inf", "1e400", "-1e400", "9" * 4301, "9" * 400, "2147483648", "1e9", "0x10",
    "1_000",
    "٣", "½", "-1", "0", "-0", "1e-320", "true", "null", "\x1b[31m", "\u202e", "\udcff", "a\0b", "\r\n", "[", "*", "{}",
    "x" * 4096, "~nobody/x", "~", "/", ".", "..", "/dev/zero", "a=b", "=", "a=", "=b", "a==", "1/0", "--", "-", "😀",
    "draft", "%s", "$HOME", "$(id)", "hf://", "hf://a/b@", "hf:/\0", "a" * 300,
    "/proc/1/root/x", "/proc/1/root/",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_odd_values_are_taken_or_refused_by_name_in_every_option(command):
    """By introspection, so that new options are tried, too: what reads a value fails in no other way."""
    taken = refused = 0
    for parameter in find_command(command).params:
        for value in ODD_VALUES:
            try:
                parameter.type.convert(value, parameter, None)
                taken += 1
            except (click.UsageError, RsgwmError):
                refused += 1
    assert taken + refused == len(ODD_VALUES) * len(find_command(command).params)
    assert refused or command == "help"


def test_no_help_shows_a_range_without_ends():
    shown = [Number()._describe_range(), Number(0)._describe_range()]
    assert shown == ["any", "x>=0"]
    assert "None" not in CliRunner().invoke(rsgwm, ["merge", "--help"]).stdout
