"""`python -m dpo NAME WORDS`, the same as `dpo NAME WORDS`."""

import signal


def main() -> None:
    """Runs `dpo NAME WORDS`. Ctrl-C ends the process without a traceback while the first modules are imported."""
    at_ctrl_c = signal.getsignal(signal.SIGINT)
    if at_ctrl_c is signal.default_int_handler:  # not ignored, as behind a shell's `&`
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dpo.front.main import main as run

    signal.signal(signal.SIGINT, at_ctrl_c)
    run()


if __name__ == "__main__":
    main()
