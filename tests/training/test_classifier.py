"""JEMClassifier: an estimator of scikit-learn."""

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import jemkit
from jemkit.errors import ConfigError, MisfitError
from jemkit.training.classifier import JEMClassifier, Layout

SHORT: dict[str, Any] = {
    "epochs": 1, "learning_rate": 0.01, "settings": {"backbone.steps": 1}, "random_state": 0,
}  # fmt: skip


@parametrize_with_checks([JEMClassifier(**SHORT)], legacy=False)
def test_scikit_learns_checks_of_the_interface_pass(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks([JEMClassifier(**SHORT)])
def test_all_of_scikit_learns_checks_of_estimators_pass(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def digits() -> tuple[Any, Any]:
    X, y = load_digits(return_X_y=True)
    return X, np.asarray([f"the {label}" for label in y])


@pytest.fixture(scope="module")
def fitted(digits: tuple[Any, Any]) -> JEMClassifier:
    X, y = digits
    return JEMClassifier(epochs=4, settings={"backbone.steps": 5}, random_state=0).fit(
        X[:1200], y[:1200]
    )


def test_it_is_a_public_name() -> None:
    assert jemkit.JEMClassifier is JEMClassifier


def test_it_classifies_digits_with_labels_of_any_type(
    fitted: JEMClassifier, digits: tuple[Any, Any]
) -> None:
    X, y = digits
    assert fitted.score(X[1200:], y[1200:]) > 0.85
    assert list(fitted.classes_) == sorted(set(y))
    proba = fitted.predict_proba(X[1200:])
    np.testing.assert_allclose(proba.sum(1), 1)
    assert (fitted.classes_[proba.argmax(1)] == fitted.predict(X[1200:])).all()
    assert fitted.history_[fitted.best_epoch_ - 1]["epoch"] == fitted.best_epoch_


def test_log_density_orders_digits_above_noise(
    fitted: JEMClassifier, digits: tuple[Any, Any]
) -> None:
    X, _ = digits
    noise = np.random.default_rng(0).uniform(0, 16, (300, 64))
    real = fitted.score_samples(X[1200:])
    assert real.shape == (597,)
    assert np.median(real) > np.median(fitted.score_samples(noise))


def test_scores_are_the_module_s(fitted: JEMClassifier, digits: tuple[Any, Any]) -> None:
    X = digits[0][:5]
    pixels = fitted.model_.bounds.from_unit(_tensor(fitted._layout.pixels(X)))
    scores = fitted.model_.model(pixels)
    np.testing.assert_allclose(fitted.score_samples(X), -scores.energy.detach(), rtol=1e-4)
    np.testing.assert_allclose(fitted.decision_function(X), scores.logits.detach(), atol=1e-4)


def _tensor(values: Any) -> Any:
    import torch

    return torch.from_numpy(values)


def test_samples_are_rows_in_the_range_of_the_data(fitted: JEMClassifier) -> None:
    rows = fitted.sample(7, steps=10)
    assert rows.shape == (7, 64)
    assert ((rows >= 0) & (rows <= 16)).all()
    assert rows.std() > 1
    assert (fitted.sample(7, steps=10) == rows).all()


def test_it_pickles_and_clones(fitted: JEMClassifier, digits: tuple[Any, Any]) -> None:
    again = pickle.loads(pickle.dumps(fitted))
    X = digits[0][:9]
    assert (again.predict_proba(X) == fitted.predict_proba(X)).all()
    with pytest.raises(NotFittedError):
        clone(fitted).predict(X)


def test_it_works_in_a_search_over_a_pipeline(digits: tuple[Any, Any]) -> None:
    X, y = (part[:200] for part in digits)
    pipeline = make_pipeline(StandardScaler(), JEMClassifier(**SHORT))
    search = GridSearchCV(pipeline, {"jemclassifier__learning_rate": [0.003, 0.03]}, cv=2)
    search.fit(X, y)
    assert search.best_score_ > 0.3


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (3, 8, 8)])
def test_images_keep_their_shape(digits: tuple[Any, Any], shape: tuple[int, ...]) -> None:
    X = digits[0][:40].reshape(40, 1, 8, 8).repeat(shape[0] if len(shape) == 3 else 1, axis=1)
    X = X.reshape(40, *shape).astype(np.uint8)
    model = JEMClassifier(network="mlp", **SHORT).fit(X, digits[1][:40])
    assert model.predict(X).shape == (40,)
    rows = model.sample(2, steps=1)
    assert rows.shape == (2, *shape)
    assert rows.max() > 16  # bytes have the range 0..255


@given(
    arrays.arrays(
        np.float64,
        st.tuples(st.integers(2, 6), st.integers(1, 90)),
        elements=st.floats(-1e6, 1e6, width=32),
    )
)
def test_vectors_come_back_from_their_images(X: Any) -> None:
    layout = Layout.of(X, None)
    pixels = layout.pixels(X)
    assert ((pixels >= 0) & (pixels <= 1)).all()
    np.testing.assert_allclose(layout.rows(pixels), X, atol=1e-6 * (np.ptp(X, 0).max() + 1))


X8, Y8 = np.arange(64.0).reshape(8, 8), [0, 1] * 4


@pytest.mark.parametrize(
    ("X", "y", "parameters", "error", "message"),
    [
        (X8, [0] * 8, {}, ValueError, "1 class"),
        (np.zeros((8, 2, 8, 8)), Y8, {}, ValueError, "square images"),
        (np.zeros((8, 4, 6)), Y8, {}, ValueError, "square images"),
        (np.zeros((8, 4, 4)), Y8, {}, ValueError, "images of 4 pixels; expected 8 to 64"),
        (np.zeros((8, 5000)), Y8, {}, ValueError, "5000 features; expected at most 4096"),
        (X8, Y8, {"data_range": (1, 0)}, ValueError, "data_range"),
        (X8, Y8, {"valid_fraction": 0.0}, ValueError, "valid_fraction"),
        (X8, Y8, {"valid_fraction": 1.5}, ValueError, "valid_fraction"),
        (X8 * np.nan, Y8, {}, ValueError, "NaN"),
        (X8, Y8, {"backbone": "jemm"}, ConfigError, "jemm"),
        (X8, Y8, {"settings": {"backbone.stepz": 1}}, ConfigError, "stepz"),
    ],
)
def test_bad_input_is_named(
    X: Any, y: Any, parameters: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        JEMClassifier(**{**SHORT, **parameters}).fit(X, y)


def test_a_classifier_without_a_density_does_not_sample() -> None:
    model = JEMClassifier(
        backbone="classifier", objective="ce", epochs=1, settings={}, random_state=0
    ).fit(X8, Y8)
    assert model.score_samples(X8).shape == (8,)
    with pytest.raises(MisfitError, match="without a density"):
        model.sample()
