"""The command line of the launcher: its own flags and the config's keys, and what is refused in one line."""

import re

import pytest

from dpo.base.errors import UserError
from launch.arguments import Request, read_arguments, unused_here
from launch.durations import minutes_of
from launch.sbatch import OPTIONS, doubts
from launch.sweep import planned_runs
from tests.launch.conftest import changed

CONFIG = ("--config", "my.yaml")
GOOD = (*CONFIG, "--gpus-per-node", "8", "--time", "60")


def parse(*argv: str) -> Request:
    """The request of a good command line with these words in the place of its own."""
    return read_arguments(changed(GOOD, argv))


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("90:00", 90),
        ("0:30", 1),
        ("1:01", 2),
        ("24:00:00", 1440),
        ("1:30:00", 90),
        ("1-0", 1440),
        ("2-03", 3060),
        ("1-02:30", 1590),
        ("1-02:30:01", 1591),
    ],
)
def test_durations_of_slurm(text: str, minutes: int) -> None:
    """The six forms of sbatch's manual, worked out by hand: 2-03 is 2 * 1440 + 3 * 60."""
    assert minutes_of(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "0:00", "1:2:3:4", "-5", "1h", "1-", "1.5", "infinite", "1-2-3"])
def test_no_durations(text: str) -> None:
    with pytest.raises(UserError, match=r"command line: --time: .*; valid: "):
        minutes_of(text)


def test_keys_with_a_dot_are_the_configs() -> None:
    argv = [
        "--loss.beta",
        "0.5",
        "--nodes",
        "2",
        "--optim.lr=-1",
        "--model.path",
        "-x",
        "--follow",
    ]
    request = parse(*argv)
    assert (request.nodes, request.follow) == (2, True)
    assert request.words == (*CONFIG, "--loss.beta", "0.5", "--optim.lr=-1", "--model.path", "-x")


def test_the_run_gets_the_config_and_its_keys() -> None:
    request = parse("--loss.beta", "0.5", "--nodes", "2")
    assert request.words == ("--config", "my.yaml", "--loss.beta", "0.5")
    assert (request.nodes, request.ranks_per_node, request.gpus, request.minutes) == (2, 8, "8", 60)


def test_bare_words_are_the_runs() -> None:
    """But those after --sweep, which are more of its values, up to the next word that is none."""
    words = ["my.yaml", "loss.beta=0.5", "--sweep", "optim.lr=1,2", "train.seed=1,2", "--nodes", "2", "loss.name=ipo"]
    request = read_arguments([*words, *GOOD[2:]])
    assert request.words == ("my.yaml", "loss.beta=0.5", "loss.name=ipo")
    assert (request.sweep, request.nodes) == (("optim.lr=1,2", "train.seed=1,2"), 2)


def test_a_flag_of_a_list_may_be_repeated() -> None:
    request = parse("--sweep", "optim.lr=1,2", "--sweep", "train.seed=1,2", "--env", "A=1", "--env", "B=2")
    assert request.sweep == ("optim.lr=1,2", "train.seed=1,2")
    assert request.env == (("A", "1"), ("B", "2"))


@pytest.mark.parametrize(
    "words", [("--nodes", "1", "--nodes=2"), ("--time", "60", "--time", "90"), ("a.yaml", "b.yaml")]
)
def test_a_flag_is_given_once(words: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="given twice"):
        planned_runs(parse(*words))


def test_a_type_of_gpus() -> None:
    request = parse("--gpus-per-node", "a100:4")
    assert (request.gpus, request.ranks_per_node) == ("a100:4", 4)


def test_ranks_without_gpus() -> None:
    request = read_arguments(["--config", "my.yaml", "--time", "60", "--ranks-per-node", "3"])
    assert (request.gpus, request.ranks_per_node) == (None, 3)


def test_what_sbatch_gets() -> None:
    request = parse("--account", "a", "--mail-type", "END", "--sbatch", "exclusive", "--sbatch", "reservation=r=1")
    assert dict(request.sbatch) == {"account": "a", "mail-type": "END", "exclusive": True, "reservation": "r=1"}


def test_an_option_of_a_plugin_is_passed_on_with_a_warning() -> None:
    options = parse("--sbatch", "bcm-power=low", "--account", "a").sbatch
    assert dict(options) == {"bcm-power": "low", "account": "a"}
    (doubt,) = doubts(options)
    assert doubt.startswith("--sbatch bcm-power: not an option of sbatch's manual")
    known = parse("--sbatch", "reservation=mine", "--sbatch", "exclusive", "--sbatch", "gres=gpu:8", "--sbatch", "hold")
    assert doubts(known.sbatch) == []


def test_the_options_of_sbatch_are_whole_words() -> None:
    """Two that end in the middle where a list is wrapped at hyphens."""
    assert {"delay-boot", "wait-all-nodes", "ntasks-per-node"} <= set(OPTIONS)
    assert [name for name in OPTIONS if not re.fullmatch("[a-z]+(-[a-z]+)*", name)] == []
    assert not {"boot", "all", "nodes-"} & set(OPTIONS)


def test_what_a_job_on_this_machine_does_not_use() -> None:
    request = parse("--cluster", "local", "--partition", "p", "--setup", "module load cuda")
    assert unused_here(request) == ["--time", "--partition"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--foll"], "--foll: unknown flag; did you mean --follow?"),
        (["--node", "2"], "--node: unknown flag; did you mean --nodes?"),
        (["--ranks_per_node", "2"], "--ranks_per_node: unknown flag; did you mean --ranks-per-node?"),
        (["--learning_rate", "1e-5"], "--learning_rate: unknown key; TRL's learning_rate is optim.lr here"),
        (["--beta", "0.5"], "--beta: unknown flag; did you mean loss.beta?"),
        (["--ranks", "8"], "--ranks: unknown flag; did you mean --ranks-per-node?"),
        (["--gpus", "8"], "--gpus: unknown flag; did you mean --gpus-per-node?"),
        (["--nproc_per_node", "8"], "--nproc_per_node: unknown flag; did you mean --gpus-per-node?"),
        (["learning_rate=1e-5"], "learning_rate: unknown key; TRL's learning_rate is optim.lr here"),
        (["two"], "two: unexpected word"),
        (["--nodes", "0"], "--nodes: must be an integer >= 1, got '0'"),
        (["--nodes", "two"], "--nodes: must be an integer >= 1, got 'two'"),
        (["--cluster", "cloud"], "--cluster: invalid choice: 'cloud'"),
        (["--cluster", "local", "--nodes", "2"], "--nodes: --cluster local is one machine, got 2 nodes"),
        (["--cluster", "debug", "--nodes", "2"], "--nodes: --cluster debug is one machine, got 2 nodes"),
        (["--time", "1:2:3:4"], "--time: '1:2:3:4' is not a duration"),
        (["--time", "2", "--signal-delay", "120"], "--signal-delay: must be below --time, 120 s, got 120 s"),
        (["--time", "2"], "--time: 120 s leave no time beside 120 s for saving a checkpoint"),
        (["--gpus-per-node", "many"], "--gpus-per-node: got 'many'"),
        (["--gpus-per-node", "0"], "--ranks-per-node: is missing, there are no GPUs"),
        (["--ranks-per-node", "4"], "--ranks-per-node: must be --gpus-per-node, one rank per GPU, got 4 and 8"),
        (["--env", "HOME"], "--env: got 'HOME'; valid: NAME=VALUE"),
        (["--env", "A B=1"], "--env: got 'A B=1'"),
        (["--sbatch", "N2"], "--sbatch: got 'N2'"),
        (["--sbatch", "wckey="], "--sbatch: got 'wckey='; valid: a long option of sbatch, KEY or KEY=VALUE"),
        (["--sbatch", "nodes=3"], "--sbatch: cannot set nodes, which the launcher sets; valid: --nodes"),
        (["--sbatch", "signal=USR1"], "--sbatch: cannot set signal, which the launcher sets; valid: --signal-delay"),
        (["--sbatch", "output=x"], "--sbatch: cannot set output, which the launcher sets; valid: other options"),
        (
            ["--sbatch", "partitoin=gpu"],
            "--sbatch: partitoin is not an option of sbatch; did you mean partition? valid: --partition",
        ),
        (
            ["--sbatch", "reservtion=r"],
            "--sbatch: reservtion is not an option of sbatch; did you mean reservation? valid: --sbatch reservation",
        ),
        (
            ["--sbatch", "ntasks-pernode=2"],
            "--sbatch: ntasks-pernode is not an option of sbatch; did you mean ntasks-per-node?",
        ),
        (["--sbatch", "partition=p"], "--sbatch: cannot set partition, which has its own flag; valid: --partition"),
        (["--sbatch", "time=5"], "--sbatch: cannot set time, which has its own flag; valid: --time"),
        (["--sbatch", "nice=1", "--sbatch", "nice=2"], "--sbatch: nice is given twice"),
        (["--container-mounts", "/a:/a"], "--container-mounts: needs --apptainer or --container-image"),
        (["--max-parallel", "2"], "--max-parallel: needs --sweep"),
    ],
)
def test_wrong_words(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as failure:
        parse(*words)
    text = str(failure.value)
    assert text.startswith("command line: ") and message in text and " valid: " in text and "\n" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus-per-node", "8"], "--time: is missing"),
        (["--time", "5"], "--gpus-per-node: is missing; valid: N, or 0 with --ranks-per-node N"),
    ],
)
def test_missing_words(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_arguments(["--config", "my.yaml", *words])


def test_help_tells_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """Every flag of the usage has a text after it."""
    with pytest.raises(SystemExit) as end:
        read_arguments(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    usage, _, rest = shown.partition("Submits")
    flags = {word.strip("[]") for word in usage.split() if word.startswith(("[--", "--"))}
    assert len(flags) > 25
    for flag in flags:
        after = rest.split(f"  {flag}", 1)[1]
        assert len(" ".join(after.split()[1:4])) > 8, flag
