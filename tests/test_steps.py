"""Which steps are stochastic."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrpo.core.random import Random
from flowgrpo.core.steps import (
    AllSteps,
    RandomSteps,
    RandomWindow,
    SlidingWindow,
    StepSelection,
    Window,
)


def select(
    selection: StepSelection, num_steps: int, iteration: int = 0, seed: int = 0
) -> list[int]:
    return selection.select(num_steps, iteration, Random(seed))


def test_all_steps_leaves_the_end_to_the_ode():
    assert select(AllSteps(), 4) == [0, 1, 2]
    assert select(AllSteps(skip_last=3), 5) == [0, 1]


def test_window_is_where_it_is_said_to_be():
    assert select(Window(start=2, size=3), 8) == [2, 3, 4]


def test_random_window_visits_every_place_and_depends_only_on_its_stream():
    window = RandomWindow(size=2, first=1, last=6)
    starts = {select(window, 10, seed=s)[0] for s in range(100)}
    assert starts == {1, 2, 3, 4}
    assert select(window, 10, iteration=3, seed=7) == select(window, 10, iteration=4, seed=7)


def test_random_steps_draws_every_step_about_equally_often():
    drawn = [select(RandomSteps(count=2, first=1, last=6), 10, seed=s) for s in range(500)]
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=10)
    assert counts[1:6].min() > 150
    assert counts.sum() == counts[1:6].sum()


def test_sliding_window_moves_on_and_starts_over():
    window = SlidingWindow(size=2, stride=1, every=3, skip_last=1)
    starts = [select(window, 5, iteration=i)[0] for i in range(13)]
    assert starts == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 1]
    strided = [select(SlidingWindow(size=2, stride=2, every=1), 8, iteration=i) for i in range(4)]
    assert strided == [[0, 1], [2, 3], [4, 5], [0, 1]]


def test_sliding_window_leaves_late_places_earlier_and_stays_or_starts_over():
    """4, 4, ceil(4 exp(-0.5)) = 3 and ceil(4 exp(-1)) = 2 iterations at the places 0 to 3."""
    window = SlidingWindow(size=2, every=4, skip_last=1, decay=0.5, decay_from=1)
    table = [0] * 4 + [1] * 4 + [2] * 3 + [3] * 2
    for at_end, after in (("restart", table), ("stay", [3] * 13)):
        kind = replace(window, at_end=at_end)
        assert [select(kind, 6, iteration=i)[0] for i in range(26)] == [*table, *after]


def test_the_largest_selections_that_fit_are_accepted():
    """Four steps, of which the first three can be stochastic."""
    for selection, steps in (
        (AllSteps(skip_last=3), [0]),
        (Window(size=3), [0, 1, 2]),
        (Window(start=2, size=1), [2]),
        (RandomWindow(size=3, first=0, last=3), [0, 1, 2]),
        (RandomSteps(count=3, first=0, last=3), [0, 1, 2]),
        (RandomSteps(count=1, first=2, last=3), [2]),
        (SlidingWindow(size=3, skip_last=1), [0, 1, 2]),
        (SlidingWindow(size=1, stride=1, every=1, skip_last=3, decay=0.0), [0]),
    ):
        assert select(selection, 4) == steps


sizes = st.integers(1, 6)
selections = st.one_of(
    st.builds(AllSteps, skip_last=st.integers(1, 6)),
    st.builds(Window, start=sizes, size=sizes),
    st.builds(RandomWindow, size=sizes, first=sizes, last=st.integers(1, 12)),
    st.builds(RandomSteps, count=sizes, first=sizes, last=st.integers(1, 12)),
    st.builds(SlidingWindow, size=sizes, stride=sizes, every=sizes, skip_last=sizes),
)


@given(selections, st.integers(2, 12), st.integers(0, 100))
@settings(deadline=None)
def test_what_is_selected_is_ascending_and_never_the_last_step(selection, num_steps, iteration):
    try:
        selection.check(num_steps)
    except ValueError:
        return
    steps = select(selection, num_steps, iteration, seed=iteration)
    assert steps
    assert steps == sorted(set(steps))
    assert steps[0] >= 0
    assert steps[-1] <= num_steps - 2


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (AllSteps(skip_last=4), "selects no step of 4"),
        (
            AllSteps(skip_last=0),
            "skip_last must be at least 1, as the last step has no noise, got 0",
        ),
        (SlidingWindow(size=2, skip_last=0), "skip_last must be at least 1"),
        (Window(start=2, size=2), "steps 2 to 3, but with num_steps = 4 only steps 0 to 2"),
        (Window(start=-1, size=2), "steps -1 to 0"),
        (Window(size=0), "selects no step"),
        (RandomWindow(size=3, first=0, last=2), r"no window of 3 steps fits into \[0, 2\)"),
        (RandomWindow(size=1, first=0, last=4), "steps 0 to 3"),
        (RandomWindow(size=0, first=0, last=2), "selects no step"),
        (RandomSteps(count=3, first=0, last=2), r"cannot draw 3 of the 2 steps in \[0, 2\)"),
        (RandomSteps(count=0, first=0, last=2), "cannot draw 0"),
        (SlidingWindow(size=3, skip_last=2), "window of 3 does not fit into 4 steps"),
        (SlidingWindow(size=0), "size, stride and every must be at least 1"),
        (SlidingWindow(size=1, stride=0), "size, stride and every must be at least 1"),
        (SlidingWindow(size=1, every=0), "size, stride and every must be at least 1"),
        (SlidingWindow(size=1, decay=-0.1), "decay must be at least 0, got -0.1"),
    ],
)
def test_impossible_selections_are_refused(selection, message):
    with pytest.raises(ValueError, match=message):
        selection.check(4)
    with pytest.raises(ValueError, match=message):
        select(selection, 4)
