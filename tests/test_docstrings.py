"""Arguments of one meaning are described by one text, and each parameter is described."""

import dataclasses
import inspect
import re

import pytest

import adamx

SECTION = re.compile(r"^(?:Args|Attributes):\n((?:    .*\n|\n)*)", re.MULTILINE)
ENTRY = re.compile(r"^    \*{0,2}(\w+): (.*\n(?:     .*\n)*)", re.MULTILINE)

# Arguments that each function explains for itself.
OWN = {
    "name": "each concept has its own slot",
    "inner": "each wrapper asks something else of the transformation in it",
    "names": "of slots, of leaves or of columns",
    "steps": "of a comparison or of a schedule",
    "count": "one is read, others are the start of a run",
    "tx": "it makes the state, reads it or goes on with it",
    "state": "of Optax, of PyTorch, of a step or of one kind of optimizer",
    "params": "arrays, shapes, or the differences of a comparison",
    "param": "of a step, and of any dtype",
    "updates": "of a step, and the differences of a comparison",
    "scalars": "of a concept, and their bytes",
    "rounding": "in a function, and in the step that calls it",
    "by": "what to print, and what was printed",
    "every": "gradients a step, and steps a measurement",
    "patterns": "to choose groups, and to leave out leaves",
    "slot": "each concept reads another slot",
}

# For other arguments: functions in which one means something else, and what.
OTHERWISE = {
    "learning_rate": {
        "adamw_independent": "no schedule: that is `multiplier`",
        "linear_rule square_root_rule": "of one batch size",
    },
    "axes": {
        "factored_ema_of_squares": "two, of rows and of columns, not those to average over",
        "muon muon_adamw orthogonalized scale_by_shape": "of the two sides of a matrix",
    },
    "momentum": {"adafactor": "an average of whole steps, not a sum of gradients"},
    "batch_size": {"normalized_weight_decay": "of examples, which it counts"},
    "b1": {
        "mars": "no schedule",
        "simplified_ademamix": "of a sum",
        "lion cautious_lion": "weights the output, b2 the slot",
        "schedule_free schedule_free_adamw": "the weight of averaged parameters, in (0, 1]",
        "ratio_bound": "numbers alone have a bound",
    },
    "b2": {
        "adabelief": "deviations, and no schedule",
        "adamax adamaxw": "a maximum has no average",
        "adan": "differences; squares have b3",
        "lion cautious_lion": "above 0",
        "radam": "no schedule",
        "ratio_bound": "numbers alone have a bound",
    },
    "alpha": {"simplified_ademamix": "of the gradient, where AdEMAMix has a second average"},
    "max_norm": {"clip_by_norm": "of one array, and no schedule"},
    "b3": {"adan": "squares, where AdEMAMix has a second average of gradients"},
    "decay": {
        "half_life_rule": "of one batch size",
        "interpolated_ema": "above 0",
        "trace": "1 is allowed",
        "rectified": "no schedule, and it is another concept's",
        "scheduled_nesterov_ema": "no schedule",
    },
    "eps": {
        "inverse_square_root_rule": "of one batch size",
        "adamax adamaxw decaying_max": "added to a magnitude, before any division",
        "adafactor factored_ema_of_squares": "added to each square",
        "adopt delayed_rms_scaling": "the smallest divisor",
        "adaptive_clip": "the smallest norm of the weights",
        "trust_ratio": "added to a norm",
        "muon muon_adamw orthogonalized": "the same, of a whole matrix",
        "update_clipping": "the smallest root, and nothing is added",
    },
    "eps_root": {"adabelief": "added in every step"},
    "dtype": {
        "muon muon_adamw orthogonalized": "of products, not of a slot",
        "zeros": "of an array, by the parameter's dtype",
    },
    "initial": {"ema": "an average of gradients may be negative"},
    "factor": {"clip_to_history": "of a norm, and no schedule"},
    "threshold": {"clip_by_rms": "of an array, where RAdam has one of steps"},
    "moments": {"stored": "explains the names"},
}


def described(function):
    """Return the texts of a docstring's arguments or attributes, by name."""
    (section,) = SECTION.findall(inspect.cleandoc(function.__doc__) + "\n") or [""]
    return {name: " ".join(text.split()) for name, text in ENTRY.findall(section)}


PUBLIC = {name: getattr(adamx, name) for name in adamx.__all__}
TEXTS = {}
for function in PUBLIC:
    for argument, text in described(PUBLIC[function]).items():
        TEXTS.setdefault(argument, {})[function] = text


def begin_alike(texts):
    """Say whether all begin with the shortest, to which some add sentences."""
    common = min(texts, key=len)
    return all(text == common or text.startswith(f"{common} ") for text in texts)


@pytest.mark.parametrize("argument", sorted(TEXTS.keys() - OWN.keys()))
def test_an_argument_of_one_meaning_has_one_text_to_which_sentences_may_be_added(argument):
    rest = dict(TEXTS[argument])
    groups = [
        {name: rest.pop(name) for name in functions.split()}
        for functions in OTHERWISE.get(argument, {})
    ]
    for group in groups:
        assert begin_alike(group.values()), group
        assert not begin_alike([*group.values(), *rest.values()]), f"no other meaning: {group}"
    common = min(rest, key=lambda name: len(rest[name]))
    for name, text in rest.items():
        assert begin_alike([rest[common], text]), (
            f"{argument} of {common} and of {name}:\n    {rest[common]}\n    {text}"
        )


@pytest.mark.parametrize("function", sorted(PUBLIC))
def test_each_parameter_is_described_and_nothing_else(function):
    thing = PUBLIC[function]
    if thing in (adamx.Transformation, adamx.PrecisionWarning, adamx.ShardWarning):
        return  # the base class takes any fields, and a warning its message
    parameters = [name for name in inspect.signature(thing).parameters if name != "_"]
    if hasattr(thing, "hyperparameters"):
        fields = thing.hyperparameters()
    else:
        fields = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
    assert list(described(thing)) in (parameters, [field.name for field in fields])


def test_the_tables_name_what_there_is():
    assert OWN.keys() <= {argument for argument, texts in TEXTS.items() if len(texts) > 1}
    assert OTHERWISE.keys() <= TEXTS.keys() - OWN.keys()
