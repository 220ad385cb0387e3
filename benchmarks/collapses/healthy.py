"""Nothing is wrong: runs that learn, of as many kinds as faults are put into."""

from dataclasses import replace
from functools import partial

from collapses._engine import quantised
from collapses._mode import PLAIN, Changes, Fault, Mode

DRIFT = {"class_path": "ReverseKL", "init_args": {"coef": 0.05, "reference": "moving"}}
moving_reference: Changes = {
    "objective.terms": {**PLAIN["objective.terms"], "drift": DRIFT},
    "trainer.sync_ref_model": True,
    "trainer.ref_model_sync_steps": 4,
    "trainer.ref_model_mixup_alpha": 0.9,
}
KINDS = {
    "healthy": Fault(changes=PLAIN),
    "healthy_recipe": Fault(),
    "healthy_slow": Fault(changes={**PLAIN, "trainer.learning_rate": 1.5e-4}),
    "healthy_two_updates": Fault(changes={**PLAIN, "trainer.steps_per_generation": 2}),
    "healthy_moving": Fault(changes=moving_reference),
    "healthy_fine_engine": Fault(changes=PLAIN, engine={"change": partial(quantised, bits=8)}),
    "healthy_short_lag": Fault(changes={**PLAIN, "trainer.learning_rate": 2e-4}, engine={"lag": 1}),
    "healthy_experts": Fault(changes={**PLAIN, "model.init_args.experts": 8}, engine={"routes": True}),
}
SIGNS = {
    "healthy_signs": Mode(
        cause=None,
        faults=[
            Fault(changes={**PLAIN, "trainer.learning_rate": 2e-4}),
            Fault(changes={"trainer.learning_rate": 2e-4}),
            Fault(changes={**PLAIN, "trainer.learning_rate": 1.2e-4}),
            Fault(changes={**PLAIN, "trainer.steps_per_generation": 2, "trainer.learning_rate": 2e-4}),
            Fault(changes={**moving_reference, "trainer.learning_rate": 2e-4}),
            Fault(changes={**PLAIN, "trainer.learning_rate": 2e-4}, engine={"change": partial(quantised, bits=9)}),
            Fault(changes={**PLAIN, "trainer.learning_rate": 1.6e-4}, engine={"lag": 1}),
            Fault(
                changes={**PLAIN, "model.init_args.experts": 8, "trainer.learning_rate": 2e-4}, engine={"routes": True}
            ),
        ],
    )
}
OPENING = {
    "healthy": Mode(
        cause=None,
        faults=[
            replace(fault, changes={**fault.changes, "trainer.learning_rate": rate})
            for rate in (2.3e-4, 2.8e-4)
            for fault in KINDS.values()
        ],
    )
}
MODES = {name: Mode(cause=None, faults=[fault]) for name, fault in KINDS.items()}
