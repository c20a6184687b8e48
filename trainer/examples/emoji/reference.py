"""Train the demo's reference model into a Triton model repository, unless a model is there already.

python trainer/examples/emoji/reference.py --model-repository FOLDER
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from data import prepare
from experiment import FULL, QUICK, train_reference
from served import REFERENCE, export


def main() -> None:
    """Leave a repository alone that has models; fill an empty one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-repository", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--cache-dir", type=Path, default=Path(".cache/emoji"), help="keeps the drawn pictures")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    repository = arguments.model_repository
    if any(repository.glob("*/config.pbtxt")) and not (repository / _UNFINISHED).exists():
        print(f"{repository} has a model, which stays as it is")
        return
    plan = QUICK if arguments.quick else FULL
    data = prepare(arguments.cache_dir, arguments.seed, plan.curated_pairs)
    model, run = train_reference(data, plan, arguments.seed, data.test.everything())
    with tempfile.TemporaryDirectory(prefix="jest-reference-") as folder:
        made = Path(folder) / "model_repository"
        export(model, data, made)
        repository.mkdir(parents=True, exist_ok=True)
        (repository / _UNFINISHED).touch()  # whoever is cut off here begins again next time
        shutil.copytree(made, repository, dirs_exist_ok=True)
        (repository / _UNFINISHED).unlink()
    print(f"{repository} has {REFERENCE}, which retrieves {run.final.retrieval.mean:.1%} by itself")


_UNFINISHED = ".unfinished"

if __name__ == "__main__":
    main()
