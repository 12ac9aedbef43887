"""`surgery doctor`: what this installation is and works with, for a report of a problem."""

from surgery.cli.group import PERTURB_CARD, command, main
from surgery.cli.syntax import echo_report


@main.command(examples=("surgery doctor", "surgery doctor --json"), card=PERTURB_CARD)
@command
def doctor(*, as_json: bool) -> None:
    """Show versions, kernels, devices, caches and settings of the Hub.

    For a report of a problem. It asks nobody on the network, writes nothing and prints no token.
    """
    from surgery.report import doctor as report
    from surgery.report.tables import stdout_terminal

    rows = report.rows()
    echo_report(rows, lambda: report.table(rows, stdout_terminal()), as_json=as_json)
