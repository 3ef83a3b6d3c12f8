"""The monitor: any model, nothing left behind."""

import threading

import nflows.distributions
import nflows.flows
import nflows.nn.nets
import nflows.transforms
import normflows
import pytest
import torch
import zuko
from torch import nn

from flowguard.ood import NotFittedError, OODConditioner, OODContextError, monitor


def vectors(n=200, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


class Flow(nn.Module):
    """Something with an encoder inside, called by a method of its own."""

    def __init__(self, encoder=None):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = encoder or nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.head = nn.Linear(2, 1)

    def sample(self, y):
        return self.head(self.encoder(y))

    forward = sample


def guarded(policy="report", **kwargs):
    conditioner = OODConditioner(policy=policy, alpha=0.01, **kwargs)
    return conditioner.fit(vectors(), progress=False).calibrate(vectors(500, 1), progress=False)


def hooked(model, levels=("encoder.0", "encoder.2"), **kwargs):
    watch = monitor(model, list(levels), alpha=0.01)
    watch.fit(vectors(), progress=False, **kwargs)
    return watch.calibrate(vectors(500, 1), progress=False, **kwargs)


FAR = torch.full((1, 3), 1e3)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# -- conditioners in the model ---------------------------------------------------------------


def test_records_the_conditioner_of_a_model():
    model = nn.Sequential(guarded(), nn.Linear(3, 1))
    y = torch.cat([vectors(3), FAR])
    with monitor(model) as watch:
        assert watch.report is None
        model(y)
        model(y[:2])
    assert [len(report) for report in watch.reports] == [4, 2]
    assert list(watch.report.levels) == ["level1"]
    assert watch.reports[0].flagged.tolist() == [False, False, False, True]
    assert torch.equal(watch.report.p_value, model[0].report.p_value)
    model(y)
    assert len(watch.reports) == 2


def test_the_policy_stays_in_force_and_what_it_refused_is_recorded():
    model = nn.Sequential(guarded("raise"))
    with monitor(model) as watch, pytest.raises(OODContextError):
        model(FAR)
    assert watch.report.flagged.tolist() == [True]


def test_in_training_it_scores_for_the_monitor_alone():
    model = nn.Sequential(guarded("raise")).train()
    model(FAR)
    with monitor(model) as watch:
        model(FAR)
    assert watch.report.flagged.tolist() == [True]


def test_in_training_it_scores_what_was_calibrated():
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    conditioner = OODConditioner(encoder, "raise", alpha=0.01)
    conditioner.fit(vectors(), progress=False).calibrate(vectors(500, 1), progress=False)
    model = nn.Sequential(conditioner).train()
    with monitor(model) as watch:
        output = model(vectors(seed=2))
    assert torch.equal(watch.report.p_value, conditioner.score(vectors(seed=2)).p_value)
    assert (output == 0).any()  # what is trained has its dropout
    assert encoder[1].training


class Attention(nn.Module):
    """Attention among the features, with a dropout that is no layer of its own."""

    def __init__(self, dropout):
        super().__init__()
        self.attention = nn.MultiheadAttention(1, 1, dropout=dropout)

    def forward(self, y):
        return self.attention(y.T[..., None], y.T[..., None], y.T[..., None])[0][..., 0].T


@pytest.mark.parametrize(
    "layer",
    [nn.Dropout(0.5), nn.BatchNorm1d(4), nn.RReLU(), Attention(0.5)],
    ids=["dropout", "batch normalisation", "random slopes", "attention"],
)
def test_hooks_refuse_what_depends_on_the_mode_in_training_mode(layer):
    model = Flow(nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2)))
    watch = hooked(model)
    with pytest.raises(
        RuntimeError, match=r"evaluation mode.*'encoder\.1.*', a .*in training mode"
    ):
        watch.__enter__()
    model.eval()
    with watch:
        model(vectors(seed=2))
    assert watch.report.flagged.double().mean() < 0.05


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4, track_running_stats=False), Attention(0.0)])
def test_hooks_take_what_is_the_same_in_both_modes(layer):
    model = Flow(nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2)))
    watch = hooked(model)
    with watch:
        model.train()(vectors(seed=2))
    assert watch.report.flagged.double().mean() < 0.05


def test_several_conditioners_go_by_their_names():
    model = nn.ModuleDict({"left": guarded(), "right": guarded()})
    with monitor(model) as watch:
        model["left"](vectors(2))
        model["right"](torch.cat([vectors(1), FAR]))
        model["left"](vectors(5))
    first, second = watch.reports
    assert list(first.levels) == ["left.level1", "right.level1"]
    assert first.flagged.tolist() == [False, True]
    assert first.alpha == pytest.approx(0.02)  # two tests at 0.01 each
    assert list(second.levels) == ["left.level1"]
    with monitor(model, levels=["right.level1"]) as watch:
        model["left"](FAR)
        model["right"](vectors(1))
    assert list(watch.report.levels) == ["right.level1"]


def test_a_model_around_a_model_does_not_hear_its_neighbour():
    a, b = nn.Sequential(guarded()), nn.Sequential(guarded())
    with monitor(a) as watch:
        b(FAR)
    assert watch.report is None


def test_a_compiled_model_with_a_conditioner_is_recorded():
    model = torch.compile(nn.Sequential(guarded(), nn.Linear(3, 1)), backend="eager")
    model(vectors(2))
    with monitor(model) as watch:
        model(torch.cat([vectors(1), FAR]))
    assert watch.report.flagged.tolist() == [False, True]


# -- hooks -----------------------------------------------------------------------------------


def test_hooked_levels_score_like_a_conditioner_around_them():
    model = Flow()
    watch = hooked(model, ["encoder"])
    conditioner = OODConditioner(model.encoder, "report", alpha=0.01)
    conditioner.fit(vectors(), progress=False).calibrate(vectors(500, 1), progress=False)
    y = torch.cat([vectors(4, 5), FAR])
    with watch:
        model.sample(y)
    report = conditioner.score(y)
    torch.testing.assert_close(watch.report.levels["encoder"].score, report.levels["level1"].score)
    torch.testing.assert_close(watch.report.p_value, report.p_value)


def test_hooked_levels_come_together_in_one_report():
    model = Flow()
    watch = hooked(model, ["encoder.2", "encoder.0"])
    with watch:
        model.sample(vectors(4, 5))
        model.sample(FAR)
    assert [len(report) for report in watch.reports] == [4, 1]
    assert set(watch.report.levels) == {"encoder.0", "encoder.2"}
    assert watch.report.flagged.tolist() == [True]
    assert watch.report.alpha == 0.01


def test_a_submodule_with_several_outputs_gives_several_levels():
    class Two(nn.Module):
        def forward(self, y):
            return [y, y[:, :2]]

    model = nn.Sequential(Two())
    watch = hooked(model, ["0"])
    with watch:
        model(FAR)
    assert list(watch.report.levels) == ["0.level1", "0.level2"]


def test_fit_and_monitor_leave_nothing_behind_also_after_errors():
    model = Flow().train()
    model.encoder[1].eval()
    watch = hooked(model)
    assert hooks(model) == 0
    assert model.training
    assert not model.encoder[1].training
    with watch:
        assert hooks(model) == 2
    assert hooks(model) == 0
    with pytest.raises(RuntimeError), watch:
        model(torch.ones(1, 7))
    assert hooks(model) == 0
    with pytest.raises(RuntimeError):
        watch.fit([torch.ones(1, 7)], progress=False)
    assert hooks(model) == 0
    broken = vectors(4)
    broken[1] = torch.nan
    for method in (watch.fit, watch.calibrate):
        with pytest.raises(ValueError, match="finite") as caught:
            method([vectors(4), broken], progress=False)
        # Also while the error is still held, and with it the frames it came through.
        assert hooks(model) == 0
        assert torch.is_grad_enabled()
        assert model.training
        del caught
    with watch:  # and it still works
        model(FAR)
    assert watch.report.flagged.tolist() == [True]


def test_a_pass_that_broke_off_does_not_mix_with_the_next():
    model = Flow()
    watch = hooked(model)
    with watch:
        model(vectors(2))
        model.encoder[0](FAR.expand(2, 3))  # the second level never came
        model(vectors(2))
    assert [set(r.levels) for r in watch.reports] == [
        {"encoder.0", "encoder.2"},
        {"encoder.0"},
        {"encoder.0", "encoder.2"},
    ]
    assert [r.flagged.any().item() for r in watch.reports] == [False, True, False]


def test_nested_monitors_record_each_for_itself():
    model = Flow()
    outer, inner = hooked(model, ["encoder.0"]), hooked(model, ["encoder.2"])
    with outer:
        model(vectors(2))
        with inner:
            model(vectors(3))
        model(vectors(4))
    assert [len(r) for r in outer.reports] == [2, 3, 4]
    assert [len(r) for r in inner.reports] == [3]
    assert list(outer.report.levels) == ["encoder.0"]
    assert hooks(model) == 0


@pytest.mark.parametrize("kind", ["conditioner", "hooks"])
def test_threads_do_not_mix_reports(kind):
    model = Flow() if kind == "hooks" else Flow(guarded())
    if kind == "conditioner":
        model.head = nn.Linear(3, 1)
    barrier = threading.Barrier(3)
    watches = [hooked(model) if kind == "hooks" else monitor(model) for _ in range(2)]
    own = [None, None]

    def work(i):
        with watches[i]:
            barrier.wait(30)
            for _ in range(20):
                model(vectors(i + 1))
            barrier.wait(30)
        own[i] = model.encoder.report if kind == "conditioner" else watches[i].report

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    barrier.wait(30)
    for _ in range(20):
        model(vectors(7))  # nobody listens here
    barrier.wait(30)
    for thread in threads:
        thread.join()
    for i in range(2):
        assert [len(r) for r in watches[i].reports] == [i + 1] * 20
        assert len(own[i]) == i + 1
    assert hooks(model) == 0


def test_the_fit_of_a_monitor_is_saved_and_loaded():
    model = Flow()
    watch, again = hooked(model), monitor(model, ["encoder.0", "encoder.2"], alpha=0.01)
    again.load_state_dict(watch.state_dict())
    assert not any(key.startswith("encoder") for key in watch.state_dict())
    with watch, again:
        model(FAR)
    assert torch.equal(watch.report.p_value, again.report.p_value)


# -- other libraries -------------------------------------------------------------------------


def _zuko():
    flow = zuko.flows.NSF(2, context=3, transforms=1, hidden_features=[16])
    name = next(n for n, m in flow.named_modules() if isinstance(m, nn.Linear))
    return flow, name, lambda y: flow(y).log_prob(torch.zeros(2))


def _nflows():
    flow = nflows.flows.Flow(
        nflows.transforms.MaskedAffineAutoregressiveTransform(2, 8, context_features=4),
        nflows.distributions.StandardNormal([2]),
        embedding_net=nn.Linear(3, 4),
    )
    return flow, "_embedding_net", lambda y: flow.log_prob(torch.zeros(len(y), 2), context=y)


def _normflows():
    layer = normflows.flows.CoupledRationalQuadraticSpline(2, 1, 8, num_context_channels=3)
    flow = normflows.ConditionalNormalizingFlow(normflows.distributions.DiagGaussian(2), [layer])
    name = next(n for n, m in flow.named_modules() if n.endswith("context_layer"))
    return flow, name, lambda y: flow.log_prob(torch.zeros(len(y), 2), context=y)


@pytest.mark.parametrize("make", [_zuko, _nflows, _normflows])
def test_flows_of_other_libraries(make):
    torch.manual_seed(0)
    flow, name, run = make()
    flow.eval()
    watch = hooked(flow, [name], run=run)
    with watch:
        run(torch.cat([vectors(3, 9), FAR]))
    assert watch.report.flagged.tolist() == [False, False, False, True]
    assert hooks(flow) == 0


# -- refusals --------------------------------------------------------------------------------


def _enter(watch):
    with watch:
        pass


def _enter_twice():
    watch = hooked(Flow())
    with watch, watch:
        pass


def _changed_since_the_fit():
    model = Flow()
    watch = hooked(model)
    nn.init.ones_(model.encoder[0].weight)
    with watch:
        model(vectors(2))


def _compiled_around():
    return monitor(torch.compile(Flow(), backend="eager"), ["_orig_mod.encoder"])


def _compiled_inside():
    model = Flow()
    watch = hooked(model)
    model.encoder.compile(backend="eager")
    return watch


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: monitor(Flow()),
            ValueError,
            "hold an OODConditioner.*levels=.*; got .*'encoder.0'",
        ),
        (lambda: monitor(Flow(), "encoder"), ValueError, "list of names; got 'encoder'"),
        (lambda: monitor(Flow(), []), ValueError, "list of names"),
        (
            lambda: monitor(Flow(), ["coder"]),
            ValueError,
            "or fitted levels; got 'coder'.*'encoder'",
        ),
        (lambda: _enter(monitor(Flow(), ["encoder"])), NotFittedError, "monitor.*call `fit"),
        (
            lambda: _enter(monitor(Flow(), ["encoder"]).fit(vectors(), progress=False)),
            NotFittedError,
            "call `calibrate",
        ),
        (lambda: monitor(Flow(), ["encoder"]).calibrate(vectors()), NotFittedError, "call `fit"),
        (
            lambda: _enter(monitor(nn.Sequential(OODConditioner()))),
            NotFittedError,
            "conditioner '0' is not fitted",
        ),
        (lambda: monitor(guarded()).fit(vectors()), RuntimeError, "call `fit` on these"),
        (lambda: monitor(guarded()).calibrate(vectors()), RuntimeError, "call `calibrate` on"),
        (_enter_twice, RuntimeError, "entered already"),
        (_changed_since_the_fit, RuntimeError, "weights must be those of the fit"),
        (lambda: _compiled_around().fit(vectors()), RuntimeError, "lies in a compiled module"),
        (lambda: _enter(_compiled_inside()), RuntimeError, "lies in a compiled module"),
        (
            lambda: monitor(Flow(), ["head"]).fit(vectors(), progress=False, run=lambda y: None),
            ValueError,
            "'head' must run once .*; got no run: say with `run=`",
        ),
        (
            lambda: (
                (m := Flow())
                and monitor(m, ["head"]).fit(vectors(), progress=False, run=lambda y: (m(y), m(y)))
            ),
            ValueError,
            "'head' must run once .*; got a second run",
        ),
    ],
)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_refused_entry_leaves_nothing_behind():
    model = Flow()
    watch = hooked(model)
    with watch:
        with pytest.raises(RuntimeError, match="entered already"):
            watch.__enter__()
        model(FAR)
    assert hooks(model) == 0
    assert len(watch.reports) == 1


def test_what_is_no_module_is_named():
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, or hold one; got str"):
        monitor("encoder")
