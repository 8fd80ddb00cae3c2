"""The page in a browser, on a phone and on a desk, while a real run goes on."""

import json
import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from superlink.onehost.processes import LocalFederation
from superlink.submit import submit
from supernode.partitions import Split, prepare_data
from tests.browser import Browser, in_browser
from tests.federation.taken import device_taken
from tests.samples import REPOSITORY, ROWS
from tests.superlink.page.served import page_of, right_at_both_widths

pytestmark = [pytest.mark.faults, in_browser]  # not in the default tests: it takes a minute
SITES = 3


def test_a_run_is_seen_from_its_first_site_to_its_last_figure_without_a_reload(
    models_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    source, results = tmp_path / "rows.json", tmp_path / "results"
    source.write_text(json.dumps(ROWS))
    results.mkdir()
    overrides = [
        str(REPOSITORY / "app/profiles/demo.toml"),
        f"model.name={json.dumps(str(tiny_model))} model.lora.peft-lora-r=4 train.seq-length=512",
        f"num-server-rounds=2 strategy.min-nodes={SITES} strategy.min-evaluate-nodes=1",
    ]
    codes: list[int] = []
    with (
        LocalFederation(tmp_path, models_dir, results, SITES) as federation,
        page_of(results) as address,
        Browser() as browser,
        ExitStack() as until_seen,
    ):
        until_seen.enter_context(device_taken(tmp_path))
        browser.open(address)
        assert "No run has begun yet." in browser.text()
        right_at_both_widths(browser)

        federation.provision()
        prepare_data(federation.federation, Split(str(source), SITES))
        control = federation.start()
        job = threading.Thread(
            target=lambda: codes.append(submit(REPOSITORY, overrides, control, federation.public))
        )
        job.start()
        try:
            browser.wait_for("document.querySelector('td a[href^=\"/runs/\"]')")
            run_id = browser.value("document.querySelector('td a').textContent")
            browser.open(f"{address}/runs/{run_id}")
            browser.wait_for("document.querySelector('#sites .chip.evaluating')")
            assert "the start: evaluating at 1 site" in browser.text()
            right_at_both_widths(browser)
            until_seen.close()
            browser.wait_for("document.querySelector('#head .chip').textContent == 'completed'")
        finally:
            until_seen.close()
            job.join()
        assert codes == [0]
        shown_whole(browser, results / run_id)
        assert browser.complaints == []
        assert {url for url in browser.asked if not url.startswith(address)} <= {"about:blank"}
        as_a_file(browser, results, run_id)


def shown_whole(browser: Browser, run: Path) -> None:
    """What the files say at the end stands on the page."""
    browser.wait_for(
        "document.querySelector('#events').innerText.includes('the run has completed')"
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    text = browser.text()
    assert f"{lines[-1]['eval_loss_median']:.3f}" in text
    assert f"{lines[-1]['mb_sent']:,.1f}" in text
    for partition, alpha in zip(lines[-1]["partitions"], lines[-1]["alphas"], strict=True):
        row = f"//tr[th='site-{partition:02d}']/td[last()]"
        cell = browser.value(f"document.evaluate(`{row}`, document, null, 2).stringValue")
        assert cell == f"{alpha:.3f}"
    assert browser.value("document.body.dataset.updates") > "1"  # and it was loaded once
    right_at_both_widths(browser)


def as_a_file(browser: Browser, results: Path, run_id: str) -> None:
    """The same page without its server: as the command writes it, it asks for nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "superlink.page", "report", run_id],
        cwd=REPOSITORY, env={**os.environ, "RESULTS_DIR": str(results)}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    served = browser.value("document.querySelector('main').innerText")
    file = Path(done.stdout.strip())
    assert file == results / run_id / "report.html"
    browser.asked.clear()
    browser.open(file.as_uri())
    assert browser.asked == [file.as_uri()]
    right_at_both_widths(browser)
    words = set(browser.value("document.querySelector('main').innerText").split())
    assert {w for w in served.split() if "site-" in w or ("." in w and "/" not in w)} <= words
