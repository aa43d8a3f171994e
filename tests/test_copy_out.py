"""The files that stand alone do: each is copied into an empty folder and runs there, with torch
and nothing of ours."""

import subprocess
import sys
from pathlib import Path

import pytest


LIBRARY = Path(__file__).resolve().parents[1] / "nanodistill"
USES = {
    "model": "m = model.init_weights(model.CausalLM(model.Config(16, 8, 16, 1, 2, 1, 4))); "
             "assert m(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 16)",
    "files": "files.write_atomic('a', 'text'); assert open('a').read() == 'text'",
    "lora": "import torch.nn as nn; layer = lora.LoRALinear(nn.Linear(3, 2), 1, 2); "
            "assert layer(torch.ones(4, 3)).shape == (4, 2)",
    "losses": "assert losses.linear_logprobs(torch.randn(3, 4), torch.randn(5, 4), "
              "torch.tensor([0, 1, 4]))[0].shape == (3,)",
    "optim": "assert optim.schedule(9, 10, 0.1, 0.0) == 1 - 0.9",
    "parallel": "assert [*parallel.micro_batches([4, 5, 6], 2)] == [([4, 5], 1), ([6], 1)]",
    "ppo": "assert ppo.gae(torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 2).bool())[0].shape "
           "== (1, 2)",
    "sampling": "ones = torch.ones(1); assert sampling.choose(torch.tensor([[0.0, 99.0]]), ones, "
                "ones / 2)[0].item() == 1",
    "stats": "assert stats.auc([0.0, 1.0], [False, True]) == 1.0",
    "vote": "assert vote.majority(['1', '1', '2']).answer == '1'",
}


@pytest.mark.parametrize("name", USES)
def test_file_runs_alone(name, tmp_path):
    (tmp_path / f"{name}.py").write_text((LIBRARY / f"{name}.py").read_text())
    # From here on any import of ours fails.
    block = "import sys; sys.modules['nanodistill'] = None; "
    code = f"{block}import torch, {name}; {USES[name]}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PATH": ""}, check=True)
