"""pip-audit over both locks: red if one has a known vulnerability.

    python .ci/audit.py [PIP-AUDIT]

Where the vulnerability service cannot be reached, or answers without knowing anything, nothing
was audited; pip-audit then says "No known vulnerabilities found". Hence the canary: a version
that is known to be vulnerable. If that is not found, a loud notice, and not red.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LOCKS = ("requirements.lock", "tests/hub/requirements.lock")
CANARY = "jinja2==2.10"
TIMEOUT_S = 600


def locked(lock: str) -> list[str]:
    """name==version of all dependencies, also those of other machines and extras."""
    text = (Path(__file__).parents[1] / lock).read_text(encoding="utf-8")
    return re.findall(r"^[\w.-]+==[\w.]+", text, re.MULTILINE)


def audit(program: str, requirements: list[str]) -> list[dict[str, Any]]:
    """What pip-audit says of each requirement.

    Raises:
        ValueError: it could not finish; the message is its last line.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(requirements))
        file.flush()
        command = [program, "-r", file.name, "--no-deps", "--disable-pip", "--format", "json"]
        try:
            done = subprocess.run(
                [*command, "--progress-spinner", "off"], capture_output=True, text=True,
                check=False, timeout=TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ValueError(f"no answer within {TIMEOUT_S} s") from None
    try:
        answers: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except ValueError:
        last = [*done.stderr.strip().splitlines(), "no output"][-2:][0]
        raise ValueError(last) from None
    return answers


def main() -> int:
    program = (sys.argv[1:] or [str(Path(sys.executable).with_name("pip-audit"))])[0]
    try:
        if not any(a.get("vulns") for a in audit(program, [CANARY])):
            raise ValueError(f"the vulnerability service does not know that {CANARY} is vulnerable")
        answers = [answer for lock in LOCKS for answer in audit(program, locked(lock))]
    except ValueError as err:
        print(f"audit: {'#' * 60}\naudit: NOTICE: NOTHING WAS AUDITED: {err}\naudit: {'#' * 60}")
        return 0
    skipped = [a["name"] for a in answers if "skip_reason" in a]
    if skipped:
        print(f"audit: NOTICE: not known to the service: {', '.join(skipped)}")
    vulnerable = [a for a in answers if a.get("vulns")]
    for a in vulnerable:
        for v in a["vulns"]:
            fixed = ", ".join(v["fix_versions"]) or "no version yet"
            print(f"audit: {a['name']} {a['version']}: {v['id']}, fixed in {fixed}")
    print(f"audit: {len(answers) - len(skipped)} of {len(answers)} packages audited, "
          f"{len(vulnerable)} of them vulnerable")  # fmt: skip
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())
