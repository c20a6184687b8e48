from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RANK = Path(__file__).with_name("rank.py")


def test_two_ranks_name_their_super_batches_alike_and_train_on_rows_of_their_own(server, tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, RANK, server.address, str(rank), "2", str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    told = [json.loads(rank.communicate(timeout=60)[0]) for rank in ranks]
    for rank, (world_size, trained) in enumerate(told):
        assert world_size == 2
        assert trained == [[f"{step:08d}", [f"{10 * step + rank}-7", f"{10 * step + rank}-5"], 16] for step in range(3)]
    submitted = {(r.super_batch_id, r.rank, r.world_size) for r in server.requests("SubmitSuperBatch")}
    assert submitted == {(f"{step:08d}", rank, 2) for step in range(3) for rank in (0, 1)}
