r"""Networks in ncnn's format: written for the tests, and computed layer by layer."""

import struct

import torch
import torch.nn.functional as F


class Writer:
    r"""Writes an RRDB network as its converter does, or with what that fuses taken apart."""

    def __init__(self, half=True, fused=True):
        self.half, self.fused = half, fused
        self.lines, self.data, self.blobs = [], [], 0

    def layer(self, kind, inputs, options="", outputs=1):
        made = [f"b{self.blobs + i}" for i in range(outputs)]
        self.blobs += outputs
        name = f"{kind}_{len(self.lines)}"
        counts = f"{len(inputs)} {outputs}"
        self.lines.append(" ".join([kind, name, counts, *inputs, *made, options]).strip())
        return made if outputs > 1 else made[0]

    def split(self, x, outputs):
        return self.layer("Split", [x], outputs=outputs)

    def conv(self, x, conv, activated=False):
        weight = conv.weight.detach()
        options = f"0={len(weight)} 1=3 4=1 5=1 6={weight.numel()}"
        fused = activated and self.fused
        y = self.layer("Convolution", [x], options + (" 9=2 -23310=1,2.000000e-01" * fused))
        if self.half:
            halves = weight.half().numpy().tobytes()
            self.data += [struct.pack("<I", 0x01306B47), halves, b"\0" * (-len(halves) % 4)]
        else:
            self.data += [struct.pack("<I", 0), weight.float().numpy().tobytes()]
        self.data.append(conv.bias.detach().float().numpy().tobytes())
        return self.layer("ReLU", [y], "0=2.000000e-01") if activated and not fused else y

    def add(self, x, by, factor=0.2):
        if self.fused and factor != 1:
            return self.layer("Eltwise", [by, x], f"0=1 -23301=2,{factor:e},1.000000e+00")
        if factor != 1:
            by = self.layer("BinaryOp", [by], f"0=2 1=1 2={factor:e}")
        return self.layer("BinaryOp", [x, by], "0=0")

    def encoder(self, encoder):
        first = x = self.conv(self.layer("Input", []), encoder.conv_first)
        for block in encoder.RRDB_trunk:
            start = x
            for dense in block.children():
                seen = [x]
                for i in range(1, 5):
                    inner = self.layer("Concat", seen) if i > 1 else x
                    seen.append(self.conv(inner, getattr(dense, f"conv{i}"), activated=True))
                x = self.add(x, self.conv(self.layer("Concat", seen, "0=0"), dense.conv5))
            x = self.add(start, x)
        a, b = self.split(x, 2)
        skip = first if encoder.long_skip == "first" else a
        x = self.add(skip, self.conv(b, encoder.trunk_conv), factor=1)
        for i in range(1, encoder.scale.bit_length()):
            x = self.layer("Interp", [x], "0=1 1=2.000000e+00 2=2.000000e+00")
            x = self.conv(x, getattr(encoder, f"upconv{i}"), activated=True)
        self.conv(self.conv(x, encoder.HRconv, activated=True), encoder.conv_last)
        return self

    @property
    def param(self):
        return "\n".join(["7767517", f"{len(self.lines)} {self.blobs}", *self.lines, ""])

    def write(self, folder, name="net"):
        (folder / f"{name}.param").write_text(self.param)
        (folder / f"{name}.bin").write_bytes(b"".join(self.data))
        return folder / f"{name}.param"


def run(network, x):
    r"""Computes a network as its layers say, one after the other."""
    blobs = {}
    for layer in network.layers:
        inputs, options = [blobs[b] for b in layer.inputs], layer.options
        match layer.kind:
            case "Input":
                y = x
            case "Split":
                (y,) = inputs
            case "Convolution":
                y = F.conv2d(*inputs, *network.weights[layer.name], padding=1)
                y = F.leaky_relu(y, options[10][0]) if options.get(9) == 2 else y
            case "ReLU":
                y = F.leaky_relu(*inputs, options[0])
            case "Concat":
                y = torch.cat(inputs, 1)
            case "Eltwise":
                y = sum(f * i for f, i in zip(options[1], inputs, strict=True))
            case "BinaryOp":
                y = options[2] * inputs[0] if len(inputs) == 1 else inputs[0] + inputs[1]
            case "Interp":
                y = F.interpolate(*inputs, scale_factor=options[1])
        blobs |= dict.fromkeys(layer.outputs, y)
    return y
