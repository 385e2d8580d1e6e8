"""The command `stepcell doctor`: prints what works on this machine."""

from __future__ import annotations

import click
import msgspec

from stepcell.cli.common import json_option
from stepcell.cli.console import echo, print_json, table


@click.command(
    epilog="""\b
Examples:
  stepcell doctor
  stepcell doctor --json
"""
)
@json_option
def command(as_json: bool) -> None:
    """List what works on this machine, what cannot be done without the rest, and how to add it."""
    from stepcell.runtime.doctor import examine

    findings = examine()
    if as_json:
        print_json({"findings": [msgspec.structs.asdict(finding) for finding in findings]})
        return
    rows = [["ok" if f.ok else "-", f.what, f.found, "" if f.ok else f.costs] for f in findings]
    table("", ["", "what", "found", "without it"], rows, to_stdout=True)
    remedies = [f for f in findings if not f.ok and f.remedy]
    if remedies:
        echo("\nto add what is missing:")
        for finding in remedies:
            echo(f"  {finding.what}: {finding.remedy}")
