"""A hub that cannot be reached: the cache answers or the error comes at once; one that answers is left alone."""

import http.server
import threading
import time

import pytest
from huggingface_hub import constants

from mohawk.core import hub
from mohawk.data.source_files import Source, load_rows
from mohawk.errors import UserError
from mohawk.export.model_card import licence_of
from mohawk.loading.configs import load_config
from mohawk.loading.models import load_teacher, load_tokenizer


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """The hub at a port where nobody listens, and what was slept."""
    slept = []
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", slept.append)
    hub._reached.cache_clear()
    yield slept
    hub._reached.cache_clear()


@pytest.mark.parametrize("load", [load_config, load_teacher, load_tokenizer])
def test_a_model_of_a_hub_that_nobody_reaches_is_one_line_at_once(nobody, load, capfd):
    with pytest.raises(UserError, match="the hub cannot be") as caught:
        load("somebody/model")
    assert "\n" not in str(caught.value) and nobody == []
    assert capfd.readouterr().err == ""
    assert constants.HF_HUB_OFFLINE is False


def test_so_is_a_dataset_and_a_model_card_is_gone_without(nobody, capfd):
    import datasets

    with pytest.raises(UserError, match="the hub cannot be reached"):
        load_rows(Source("somebody/data"), [], None)
    assert datasets.config.HF_HUB_OFFLINE is False
    assert licence_of("somebody/model") is None
    assert nobody == [] and capfd.readouterr().err == ""


def test_a_hub_that_answers_is_asked_as_ever(nobody, monkeypatch):
    """It is asked once in a while whether it is there, whatever it says, and then for what is wanted."""
    asked = []

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(hub, "REMEMBERED", 1e9)  # no minute ends between the two
    try:
        for _ in range(2):
            with hub.hub_or_cache("somebody/model"):
                assert constants.HF_HUB_OFFLINE is False
    finally:
        server.shutdown()
        server.server_close()
    assert asked == ["/"]


def test_a_local_folder_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_reached", lambda minute: pytest.fail("the hub was asked"))
    with hub.hub_or_cache(tmp_path):
        assert constants.HF_HUB_OFFLINE is False
