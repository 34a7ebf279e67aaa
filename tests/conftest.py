"""One thread for each test process: the networks are tiny, and the processes of ``pytest -n`` share the cores."""

import os
from urllib.error import URLError

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in the programs that tests start


@pytest.fixture(autouse=True)
def network(monkeypatch, tmp_path_factory):
    """No test reaches the network or what was downloaded before; the list holds the addresses that were asked for."""
    asked = []

    def offline(request, *args, **kwargs):
        asked.append(request.full_url)
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr("torch.hub.urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.getbasetemp() / "torch_home"))
    return asked
