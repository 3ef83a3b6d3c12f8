r"""What several wings compute: factorisations matrix by matrix, full precision, and
evaluation mode."""

import threading

import pytest
import torch
from torch import backends

from flowguard import numerics
from flowguard.numerics import evaluation_mode, full_precision

CASES = {
    "inv": (numerics.inv, torch.linalg.inv, 1),
    "inv_ex": (lambda a: numerics.inv_ex(a)[0], torch.linalg.inv, 1),
    "logabsdet": (numerics.logabsdet, lambda a: torch.linalg.slogdet(a).logabsdet, 1),
    "inv of both": (lambda a: numerics.inv_and_logabsdet(a)[0], torch.linalg.inv, 1),
    "logabsdet of both": (
        lambda a: numerics.inv_and_logabsdet(a)[1],
        lambda a: torch.linalg.slogdet(a).logabsdet,
        1,
    ),
    "lower": (lambda a: numerics.lu(a)[1], lambda a: torch.linalg.lu(a)[1], 1),
    "upper": (lambda a: numerics.lu(a)[2], lambda a: torch.linalg.lu(a)[2], 1),
    "solve": (numerics.solve, torch.linalg.solve, 2),
}


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_several_matrices_are_as_each_of_them(name, batch):
    ours, whole, arguments = CASES[name]
    given = [torch.randn(*batch, 5, 5, dtype=torch.float64) for _ in range(arguments)]
    for t in given:
        t.requires_grad_()
    found, expected = ours(*given), whole(*given)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(found.sum(), given)
    for a, b in zip(gradients, torch.autograd.grad(expected.sum(), given), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def test_of_several_matrices_it_is_told_which_are_singular():
    matrices = torch.stack([torch.eye(2), torch.zeros(2, 2), torch.eye(2)])
    assert (numerics.inv_ex(matrices)[1] != 0).tolist() == [False, True, False]
    with pytest.raises(RuntimeError, match="singular"):
        numerics.inv(matrices)
    with pytest.raises(RuntimeError, match="zero"):
        numerics.inv_and_logabsdet(matrices)


@pytest.mark.parametrize("name", CASES)
def test_transforms_of_functions_and_compiled_code_go_through(name):
    ours, _, arguments = CASES[name]
    given = [torch.randn(2, 3, 3, dtype=torch.float64) for _ in range(arguments)]
    derivative = torch.func.jacrev(ours)(*given)
    assert derivative.isfinite().all()
    assert torch.allclose(derivative, torch.func.jacfwd(ours)(*given), rtol=1e-9, atol=1e-9)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*given), ours(*given))


PRODUCTS = getattr(backends.mkldnn, "matmul", None)
NEW = pytest.mark.skipif(PRODUCTS is None, reason="torch has one setting for all products")


def factors():
    return torch.randn(64, 64), torch.randn(64, 64)


def test_the_matrix_units_of_the_tests_round_where_they_may(medium):
    a, b = factors()
    exact = a @ b
    with medium():
        rough = a @ b
    assert 1e-3 < float((rough - exact).norm() / exact.norm()) < 1e-2


def test_products_are_exact_within_and_as_the_user_has_them_after(medium):
    a, b = factors()
    exact = a @ b
    with medium():
        rough = a @ b
        with full_precision(a):
            within = a @ b
        after = a @ b
    assert torch.equal(within, exact)
    assert torch.equal(after, rough)


def test_products_of_this_machine_are_exact_within():
    """From 256 channels on the settings choose another product, also without matrix units."""
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    exact = a @ b
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision(a):
            within = a @ b
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(within, exact)


def test_autocast_is_off_within():
    a, b = factors()
    with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(a):
        assert (a @ b).dtype == torch.float32


def test_settings_come_back_after_an_exception_too(medium):
    a, _ = factors()
    with medium():
        with pytest.raises(KeyError), full_precision(a):
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
        assert PRODUCTS is None or PRODUCTS.fp32_precision == "bf16"


@NEW
def test_a_general_setting_stays_general():
    PRODUCTS.fp32_precision = "none"  # and not what the general setting of another test has left
    backends.fp32_precision = "tf32"
    try:
        with full_precision(torch.zeros(1)):
            assert PRODUCTS.fp32_precision == backends.mkldnn.conv.fp32_precision == "ieee"
        assert PRODUCTS.fp32_precision == backends.mkldnn.conv.fp32_precision == "tf32"
    finally:
        backends.fp32_precision = "none"
    assert PRODUCTS.fp32_precision == backends.mkldnn.conv.fp32_precision == "none"


@NEW
@pytest.mark.parametrize(
    ("backend", "operation", "value"),
    [
        ("mkldnn", "matmul", "bf16"),
        ("mkldnn", "matmul", "tf32"),
        ("mkldnn", "conv", "bf16"),
        ("mkldnn", "conv", "tf32"),
        ("cuda", "matmul", "tf32"),
    ],
)
def test_the_setting_of_one_operation_is_seen(backend, operation, value):
    setting = getattr(getattr(backends, backend), operation)
    before = setting.fp32_precision
    setting.fp32_precision = value
    try:
        with full_precision(torch.zeros(1)):
            assert setting.fp32_precision == "ieee"
        assert setting.fp32_precision == value
    finally:
        setting.fp32_precision = before


@NEW
def test_what_the_user_sets_within_stays():
    PRODUCTS.fp32_precision = "bf16"
    try:
        with full_precision(torch.zeros(1)):
            PRODUCTS.fp32_precision = "tf32"
        assert PRODUCTS.fp32_precision == "tf32"
    finally:
        PRODUCTS.fp32_precision = "none"


@NEW
def test_the_last_of_several_threads_brings_the_settings_back():
    """The first leaves while the second is still within."""
    first_left, second_entered = threading.Event(), threading.Event()
    seen = []

    def second():
        with full_precision(torch.zeros(1)):
            second_entered.set()
            first_left.wait()
            seen.append(PRODUCTS.fp32_precision)
        seen.append(PRODUCTS.fp32_precision)

    thread = threading.Thread(target=second)
    PRODUCTS.fp32_precision = "bf16"
    try:
        with full_precision(torch.zeros(1)):
            thread.start()
            second_entered.wait()
        first_left.set()
        thread.join()
        assert seen == ["ieee", "bf16"]
        assert PRODUCTS.fp32_precision == "bf16"
    finally:
        PRODUCTS.fp32_precision = "none"


@NEW
def test_before_torch_has_a_setting_for_each_operation_the_one_for_all_is_changed(monkeypatch):
    monkeypatch.delattr(type(backends.mkldnn), "matmul")
    monkeypatch.delattr(type(backends.mkldnn), "conv")
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision(torch.zeros(1)):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_torch_can_tell_its_settings_within_and_after():
    """It refuses to, where its older and newer settings contradict each other."""
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision(torch.zeros(1)):
            assert not backends.cuda.matmul.allow_tf32
            assert backends.cudnn.allow_tf32
        assert backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@NEW
def test_settings_of_single_operations_come_back_under_the_one_for_all():
    torch.set_float32_matmul_precision("medium")
    PRODUCTS.fp32_precision = "ieee"
    backends.mkldnn.conv.fp32_precision = "bf16"
    try:
        with full_precision(torch.zeros(1)):
            assert PRODUCTS.fp32_precision == backends.mkldnn.conv.fp32_precision == "ieee"
        assert PRODUCTS.fp32_precision == "ieee"
        assert backends.mkldnn.conv.fp32_precision == "bf16"
        assert backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        backends.mkldnn.conv.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


def test_it_compiles_to_one_graph():
    def product(a, b):
        with full_precision(a):
            return a @ b

    a, b = factors()
    compiled = torch.compile(product, backend="eager", fullgraph=True)
    assert torch.equal(compiled(a, b), product(a, b))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(a, b).dtype == torch.float32


def test_modes_come_back_with_the_last_of_several_threads():
    """The first leaves while the second is still within."""
    layers = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(2), torch.nn.ReLU())
    layers[2].eval()
    first_left, second_entered = threading.Event(), threading.Event()
    seen = []

    def modes():
        return [module.training for module in layers.modules()]

    def second():
        with evaluation_mode(layers):
            second_entered.set()
            first_left.wait()
            seen.extend(modes())

    thread = threading.Thread(target=second)
    with evaluation_mode(layers):
        thread.start()
        second_entered.wait()
    first_left.set()
    thread.join()
    assert seen == [False] * 4
    assert modes() == [True, True, True, False]


def test_evaluation_mode_within_evaluation_mode_ends_with_the_outer_one():
    layer = torch.nn.Dropout()
    with evaluation_mode(layer):
        with evaluation_mode(layer):
            assert not layer.training
        assert not layer.training
    assert layer.training
