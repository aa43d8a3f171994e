import os
import random
import signal
from pathlib import Path

import pytest
import torch

from data.tiny.make import make_tokenizer
from nanodistill.model import CausalLM, Config, init_weights


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Of the stages that tests run as processes too: pytest -n has a test on each core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# Under nohup, or a script's &, these are ignored: here, and in the processes that tests stop.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# A stub of the driver (FAKE_CUDA names it) computes nothing.
card = pytest.mark.skipif(not torch.cuda.is_available() or "FAKE_CUDA" in os.environ,
                          reason="there is no CUDA card")
# What sampling's and training's logprobs differ by at most: by rounding, bf16's on a card.
SAMPLER_GAP = 0.2 if torch.cuda.is_available() else 1e-4
# Of the workplace this was built in; users have none.
ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"


def random_model(kind=CausalLM, seed=0, **changes):
    """A small model with weights large enough that attention and positions matter to the output."""
    shape = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                 max_position_embeddings=128)
    config = Config(**{**shape, **changes})
    model = init_weights(kind(config), torch.Generator().manual_seed(seed), std=0.3).eval()
    for name, parameter in model.named_parameters():
        # Norms and biases too: ones and zeros would hide a missing one.
        if name == "score.weight" or parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3,
                                  generator=torch.Generator().manual_seed(seed))
    return model


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A folder with the tiny task's tokenizer, made anew."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, random.Random(0))
    return folder


def pytest_collection_modifyitems(config, items):
    """What takes minutes is skipped, unless -m asks for it."""
    for item in items:
        if "slow" in item.keywords and "slow" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest -m slow"))


@pytest.fixture(scope="session")
def assets():
    if not ASSETS.exists():
        pytest.skip(f"no shared assets at {ASSETS}")
    return ASSETS
