"""What one run of the demo measured, and what follows from it."""

from dataclasses import dataclass

from experiment import Plan
from training import Point, Run


@dataclass(frozen=True)
class Results:
    """One run of the demo.

    Attributes:
        reference: training of the reference model; part of neither learner's figures. None: the stack had one.
        uniform: the learner that trained on the stream as it came.
        jest: the learner whose sub-batches were selected.
        inference: who embedded for the reference model ("Triton ...", "this process").
    """

    plan: Plan
    seed: int
    reference: Run | None
    uniform: Run
    jest: Run
    inference: str

    @property
    def learners(self) -> tuple[Run, Run]:
        """Both learners' runs."""
        return self.uniform, self.jest

    @property
    def target(self) -> float:
        """Uniform's final retrieval, the level that JEST has to reach."""
        return self.uniform.final.retrieval.mean

    @property
    def reached(self) -> Point | None:
        """Where JEST's curve reached the target for good."""
        return self.jest.reach(self.target)

    @property
    def examples_ratio(self) -> float | None:
        """How many times more examples uniform trained on than JEST needed to get as far."""
        reached = self.reached
        return None if reached is None else self.uniform.final.examples_trained / reached.examples_trained

    @property
    def seconds_ratio(self) -> float | None:
        """The same in wall-clock; below one, JEST was slower."""
        reached = self.reached
        return None if reached is None else self.uniform.final.seconds / reached.seconds

    def verdict(self) -> str:
        """Say in one sentence who needed how many examples."""
        uniform = self.uniform.final
        if self.reached is None or self.examples_ratio is None:
            return (
                f"JEST did not reach uniform's final retrieval ({self.target:.1%}): "
                f"it ended at {self.jest.final.retrieval.mean:.1%}."
            )
        return (
            f"JEST reached uniform's final retrieval ({self.target:.1%}) after training on "
            f"{self.reached.examples_trained:,} examples instead of {uniform.examples_trained:,} "
            f"({self.examples_ratio:.1f} times fewer), and ended at {self.jest.final.retrieval.mean:.1%}."
        )

    def notes(self) -> list[str]:
        """Say what a reader has to know to judge the figures."""
        notes = []
        if self.reached is not None:
            looked_at = self.reached.examples_loaded / self.uniform.final.examples_loaded
            notes.append(
                f"The ratio counts examples trained on. To reach the target JEST looked at "
                f"{self.reached.examples_loaded:,} examples, {looked_at:.2f} times as many as uniform, "
                f"and took {self.reached.seconds:.0f} s of wall-clock where uniform took "
                f"{self.uniform.final.seconds:.0f} s."
            )
        if self.reference is not None:
            reference = self.reference.final
            notes.append(
                f"Training the reference took {reference.seconds:.0f} s on {self.plan.curated_pairs:,} clean pairs and "
                "is counted in neither run: it pays when several jobs share the reference or it is used again. "
                f"By itself the reference retrieves {reference.retrieval.mean:.1%}."
            )
        notes.append(f"For the reference model, embeddings were computed by {self.inference}.")
        notes.append(
            "The stream was made to show what selection is for: a few emoji are repeated all the time, and half of "
            "the captions are useless. Most of the gain is cleaning and avoiding duplicates; on a clean stream "
            "without a duplicated head there is little to win."
        )
        notes.append(
            "The two learners start from the same weights. Learning rates were chosen for each on a validation "
            "split, with equally many tries; retrieval is measured on drawings that are in no training pair."
        )
        notes.append("This is one seed and a small test set: differences of one or two points mean nothing.")
        return notes
