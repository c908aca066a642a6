"""python -m fused_lstm.tune: tunes the sizes of an LSTM, as fused_lstm.tune() does a module's."""

import argparse

import torch

from fused_lstm import LSTM, tune


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fused_lstm.tune",
        description="Time the kernels and torch's own LSTM on this device; later calls of such sizes take the fastest.",
    )
    parser.add_argument("--input-size", type=int, help="default: the hidden size")
    parser.add_argument("--hidden-size", type=int, nargs="+", default=[512])
    parser.add_argument("--num-layers", type=int, default=1)
    parser.add_argument("--proj-size", type=int, default=0)
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32", "float64"], nargs="+", default=["bfloat16"]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inference", action="store_true", help="time calls without gradients alone")
    parser.add_argument("--again", action="store_true", help="time also what is known")
    args = parser.parse_args()
    for dtype in args.dtype:
        for H in args.hidden_size:
            module = LSTM(
                args.input_size or H,
                H,
                args.num_layers,
                proj_size=args.proj_size,
                bidirectional=args.bidirectional,
                device=args.device,
                dtype=getattr(torch, dtype),
            )
            for B in args.batch:
                x = torch.randn(args.steps, B, module.input_size, device=args.device, dtype=getattr(torch, dtype))
                print(f"{dtype}, H {H}, B {B}, T {args.steps}, {'inference' if args.inference else 'training'}")
                with torch.set_grad_enabled(not args.inference):
                    tune(module, x, again=args.again)
                    print(module.plan(x), end="\n\n")


if __name__ == "__main__":
    main()
