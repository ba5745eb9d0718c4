"""`lvnas doctor`."""

import dataclasses
import json
import sys

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Check this installation; exit code 1 if something is missing."""
    from lvnas.doctor import examine

    findings = examine()
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'FAIL'} {finding.what}: {finding.found}")
    sys.exit(0 if all(finding.ok for finding in findings) else 1)
