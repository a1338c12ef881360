"""A real browser without a window, for tests of pages; none where no Chromium is installed."""

import os
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)


def browse(page: Path, folder: Path, *options: str) -> str:
    """What Chromium prints of a page on this disk, with no network. folder: for its profile."""
    assert BROWSER is not None
    command = [
        BROWSER, "--headless=new", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--force-device-scale-factor=1",
        # containers have a small /dev/shm, and root no sandbox
        "--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else []),
        *options, page.resolve().as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout
