"""From a configuration to what it names: rewards are loaded as often as they are needed."""

from __future__ import annotations

from collections import Counter

import pytest

from apps import build, configured, evaluate
from diffalign.config import is_fitted
from diffalign.errors import ConfigError
from diffalign.types import Reward


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each reward was loaded."""
    found: Counter[str] = Counter()
    original = build.load_reward

    def load(spec: str) -> Reward:
        found[spec] += 1
        return original(spec)

    monkeypatch.setattr(build, "load_reward", load)
    return found


@pytest.mark.parametrize("recipe", ["emoji-draft", "emoji-refl", "quickstart", "emoji-ddpo"])
def test_a_check_loads_each_reward_once(loaded: Counter[str], recipe: str) -> None:
    """But for those that the run fits itself, which are not there yet."""
    config = configured.configuration(recipe)
    build.check(config)
    named = {spec for spec in (*(e.reward for e in config.rewards), *config.evaluation.rewards) if not is_fitted(spec)}
    assert loaded == dict.fromkeys(named, 1)


def test_a_reward_without_a_gradient_is_refused_by_its_name(loaded: Counter[str]) -> None:
    config = configured.configuration("emoji-draft", ["rewards=[compressibility]"])
    with pytest.raises(ConfigError, match="draft follows the reward's own gradient, and compressibility has none"):
        build.check(config)
    weighless = "rewards=[clip, {reward: compressibility, weight: 0}]"
    build.check(configured.configuration("emoji-draft", [weighless, "evaluation.rewards=[emoji-checker]"]))


def test_a_model_alone_is_sampled_as_it_was_made_for_and_not_as_a_recipe_trains_it() -> None:
    """`emoji-ddpo` trains two steps without guidance; the model itself draws in ten, with guidance."""
    config = build.standard("embedded:emoji")
    assert config is not None
    assert (config.sampler.steps, config.sampler.guidance_scale, config.model) == (10, 3.0, "embedded:emoji")
    assert evaluate.configuration("embedded:emoji", None, ["evaluation.seeds_per_prompt=1"]).sampler == config.sampler
    assert build.standard("somebody/model") is None


@pytest.mark.parametrize("reward", ["emoji-checker", "hidden-utility?rater=emoji", "findings-gold"])
def test_rewards_that_know_another_worlds_prompts_are_refused(reward: str) -> None:
    """Unless they have no weight, or the prompts are one's own, which may be of any world."""
    world = "findings" if reward == "findings-gold" else "emoji"
    with pytest.raises(ConfigError, match="judges the prompts of") as caught:
        build.check(configured.configuration("brain-mr-ddpo", [f"rewards=['{reward}']"]))
    assert str(caught.value) == f"rewards: {reward} judges the prompts of {world} alone, and prompts.source is brain-mr"
    if world == "emoji":
        for own in ("prompts.source=prompts.txt", f"rewards=[clip, {{reward: '{reward}', weight: 0}}]"):
            build.check(configured.configuration("brain-mr-ddpo", [f"rewards=['{reward}']", own]))
