"""The net's own test: each planted fault is caught by the tests that are named beside it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fused_lstm.kernels.environment import VERSION

ROOT = Path(__file__).parents[1]

# Most of a process's time is its start: one that has imported torch and triton forks a child for each run. It reads a
# line (folder, then pytest's arguments, in JSON) and writes pytest's exit status; the output is in the folder. The copy
# must be what the tests import, also where the package is installed from the tree.
SERVER = """
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import triton.runtime.interpreter
import triton.testing

for line in sys.stdin:
    folder, *arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        sys.path.insert(0, folder)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import fused_lstm.kernels.cell

        for module in (fused_lstm, fused_lstm.kernels.cell):
            assert Path(folder) in Path(module.__file__).parents, module.__file__
        status = int(pytest.main(arguments))
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

STOOD_IN = "test_refusals.py::test_stand_ins_of_both_passes[dense-layers with dropout]"
REFUSED = "test_refusals.py::test_the_next_candidate_runs[forward-too large-1]"
CHECKED = "test_refusals.py::test_spills_before_the_first_step_count_where_no_step_was_checked[capability1-True]"
RESIDENT = "test_dispatch.py::test_what_keeps_tiles_from_a_device_is_said_in_words"
LARGE = "test_dispatch.py::test_a_large_batch_goes_where_the_model_says[16-options0-grid]"
STACKED_STEP = "test_one_step.py::test_one_step_of_a_stack[cpu-(4, 1, 0, 33, 9, 7)-dtype2]"
NARROW_STEP = "test_step_kernel.py::test_16_byte_loads_are_for_rows_that_they_divide[dtype1-20-8]"
MISALIGNED_STEP = "test_step_kernel.py::test_16_byte_loads_are_for_aligned_tensors"
LONG_STEP = "test_one_step.py::test_one_step_of_a_stack[cpu-(2, 1, 0, 150, 2, 700)-dtype3]"
NEAREST = "test_quantized.py::test_integers_are_the_nearest[dtype2]"
EIGHT_BITS = (
    "test_quantized.py::test_equals_nn_lstm_with_the_weights_that_they_stand_for"
    "[cpu-(2, 2, 0, 24, 9, 40)-int8-dtype2-1]"
)
OF_NARROW = "test_narrow.py::test_a_launch[cpu-72-int8-dtype2]"
NARROW_SCHEDULE = "test_narrow.py::test_no_schedule_breaks_it[round_robin-dtype0]"
LARGE_H0 = "test_narrow.py::test_first_h_that_float16_does_not_hold[cpu-dtype1]"
EVERY_NUMBER = "test_narrow.py::test_every_number_of_8_bits_is_made_wide_exactly[int8-bf16]"
MADE_WIDE = "test_narrow.py::test_where_it_is_made_wide[cpu]"
STEP_SCHEDULE = "test_step_kernel.py::test_no_schedule_breaks_a_stack[round_robin-(4, 1, 0, 9, 2)]"
IN_SESSION = "test_session.py::test_equals_the_model_step_by_step[graph-cpu-LSTM]"
DROPOUT_IN_SESSION = "test_session.py::test_equals_the_model_step_by_step[no graph-cpu-nn.LSTM]"
ONE_ROW = "test_kernels.py::test_awkward_shapes[cpu-9-1-16]"
TF32 = "test_tf32.py::test_no_product_cuts_its_operands[step]"
SWITCH = "test_tf32.py::test_each_class_asks_the_switch_of_the_one_that_it_replaces[LSTMCell-False]"
STEP = "test_kernels.py::test_step_with_many_programs[cpu-False-dtype3-flags]"
POLLED = "test_kernels.py::test_step_with_many_programs[cpu-False-dtype2-polled]"
IN_TURN = "test_kernels.py::test_step_with_many_programs[cpu-False-dtype2-in turn]"
IN_PARTS = "test_kernels.py::test_step_with_many_programs[cpu-False-dtype2-in parts]"
RESET_POLLED = "test_kernels.py::test_layouts[cpu-reset-False-polled]"
RECURRENCES = "test_kernels.py::test_several_recurrences_in_a_launch[layers with dropout-dense]"
PACKED = "test_kernels.py::test_layouts[cpu-packed-False-local]"
REVERSE = "test_kernels.py::test_layouts[cpu-packed-True-local]"
PACKED_STEP = "test_kernels.py::test_layouts[cpu-packed-False-step]"
REVERSE_STEP = "test_kernels.py::test_layouts[cpu-packed-True-step]"
PADDED = "test_kernels.py::test_layouts[cpu-lengths-False-local]"
RESET = "test_kernels.py::test_layouts[cpu-reset-False-local]"
RESET_STEP = "test_kernels.py::test_layouts[cpu-reset-False-step]"
OF_CELL = "test_recurrent_kernels.py::test_forms[cpu-widest-step-gru]"
OF_CELL_LOCAL = "test_recurrent_kernels.py::test_forms[cpu-widest-local-gru]"
CELL_RESET_LOCAL = "test_recurrent_kernels.py::test_layouts[cpu-slstm-lengths and reset]"
CELL_RESET = "test_recurrent_kernels.py::test_layouts[cpu-five_gates-lengths and reset]"
PRINTED = "test_cells.py::test_the_print_is_the_function_and_its_derivative[slstm-dtype1]"
OF_LAYER = "test_recurrent.py::test_every_state_and_gradient[gru-dense]"
IN_CHUNKS = "test_recurrent.py::test_recompute_in_chunks_is_the_same[two states-unsorted]"
LOOP = "test_sequences.py::test_every_state_against_a_loop_over_nn_lstm"
STATES = f"{LOOP}[cpu-lengths and reset to hx-two layers, both directions-dtype3]"
BOTH = f"{LOOP}[cpu-lengths and reset-two layers, both directions-dtype3]"
PROJECTED = f"{LOOP}[cpu-lengths-projection, both directions-dtype3]"
OF_PROJECTED = f"{LOOP}[cpu--projection, both directions-dtype3]"
RESET_TO_ZERO = "test_sequences.py::test_resets_equal_cutting[cpu-zero-two layers, both directions-dtype3]"
LENGTHS = "test_sequences.py::test_lengths_equal_packing[cpu-two layers, both directions-dtype3]"
LAYERS = "test_parity.py::test_lstm[cpu-batch first-dtype3]"
PROJECTION = "test_parity.py::test_lstm[cpu-projection-dtype3]"
WITHIN = "test_projection.py::test_every_state_and_gradient[cpu--rows first]"
WITHIN_LENGTHS = "test_projection.py::test_every_state_and_gradient[cpu-lengths-steps first]"
WITHIN_RESET = "test_projection.py::test_every_state_and_gradient[cpu-reset-steps first]"
UNSORTED = "test_parity.py::test_packed[cpu-packed-dtype3]"
FLOAT32_CELL = "test_recurrence.py::test_cell_is_float32_across_the_loop[cpu-fp16]"
SMALL = "test_recurrence.py::test_small_activations_keep_their_relative_accuracy[cpu]"
DROPOUT = "test_dispatch.py::test_dropout_draws_the_masks_of_nn_lstm"
ONE_LAUNCH = "test_stack.py::test_parity[cpu-3-3-36-4-dtype3]"
MASKS = "test_stack.py::test_dropout_by_its_own_masks[dtype3]"
DEALT = "test_stack.py::test_rows_are_dealt_by_their_lengths"
DERIVATIVE = "test_reference.py::test_backward_is_the_derivative_of_forward[dense-False-4]"
TRACE = "test_trace.py::test_torch_cell[two layers, both directions-hx]"
TRACE_OF_PADDING = "test_trace.py::test_reference[cpu-one layer-lengths]"
RECOMPUTED = (
    "test_memory.py::test_every_state_and_gradient"
    "[cpu-lengths and reset to hx-two layers, both directions-4-torch.float64]"
)
IN_GRAPH = "test_graphs.py::test_keywords_in_one_graph[return_states]"
LEVEL = "test_transforms.py::test_backward_through_vmap[stacked weights]"
ALONG = "test_transforms.py::test_levels[jvp of grad]"
MASK = "test_mask.py::test_every_state_and_gradient"
MASK_TO_HX = f"{MASK}[cpu-lengths and reset to hx-hold-two layers, both directions]"
MASK_PAST = f"{MASK}[cpu-lengths and reset-hold-one layer]"
MASK_HELD = f"{MASK}[cpu-reset-hold-two layers, both directions]"
MASK_RESET = f"{MASK}[cpu-lengths and reset-zero-two layers, both directions]"
COMPILED = "test_offline.py::test_bounded_waits"

# By file: a fault, the text that it replaces, the text that it puts there, and a test that must then fail.
FAULTS = {
    "kernels/cell.py": {
        "derivative of a gate": ("dg = dc * i * (1.0 - g * g)", "dg = dc * i * (1.0 - g)", ONE_ROW),
        "coefficient of the tanh series": ("-17.0 / 315", "17.0 / 315", ONE_ROW),
        "tanh without its series": ("tl.abs(x) < 0.25", "tl.abs(x) < 0.0", SMALL),
    },
    "kernels/forward.py": {
        "stride of the input gates": ("gate = at.rows[None, :] * (4 * H)", "gate = at.rows[None, :] * (3 * H)", STEP),
        "cell rounded to 16 bits": ("active, c_next, c_tile", "active, c_next.to(tl.float16).to(ACC), c_tile", STEP),
        "cell of rows that have ended": ("tl.where(active, c_next, c_tile)", "c_next", PACKED_STEP),
        "order of the reverse direction": ("locate(time_of(step, rows),", "locate(step,", REVERSE_STEP),
        "a reset that keeps h": ("without_starts(at.mask, at, layout)", "at.mask", RESET_STEP),
        "a reset that keeps c": ("tl.where(at.start[None, :], c_reset_tile, c_tile)", "c_tile", RESET_STEP),
        "cell of the launch before": ("mask & (step_begin > 0)", "mask & (step_begin > 1)", STEP),
        "cells of the padding": ("new_zeros if layout.padded else input_gates.new_empty", "new_empty", PADDED),
        "the layer below a step late": ("(at.rows - total_rows) * H", "(before.rows - total_rows) * H", RECURRENCES),
        "bias of the layer below": ("below * (4 * H) + units[:, None]", "0 * below + units[:, None]", RECURRENCES),
        "h without dropout for the layer above": ("(y if dropped is None else dropped)", "y", RECURRENCES),
        "h of the wrong neighbour": ("locate(time_before(at.t, rows),", "locate(at.t,", REVERSE_STEP),
    },
    "kernels/backward.py": {
        "dc of rows that have ended": ("tl.where(active, dc_prev, dc)", "dc_prev", PACKED_STEP),
        "the layer above a step late": (
            "(at.rows + total_rows) * (4 * H)",
            "(after.rows + total_rows) * (4 * H)",
            RECURRENCES,
        ),
        "dy for every layer": ("active & last_layer", "active", RECURRENCES),
        "gradient past what was dropped": ("dh_above = drop(dh_above,", "drop(dh_above,", RECURRENCES),
        "c0 taken as zero": ("ACC), c_prev,", "ACC), c_prev * (step < rows.last),", STEP),
        "dgates across a reset": (
            "without_starts(at.mask & after.mask, after, layout)",
            "at.mask & after.mask",
            RESET_STEP,
        ),
        "gradient of the cells dropped": ("dc += tl.load(dc_steps", "dc += 0 * tl.load(dc_steps", STEP),
        "dhn dropped": ("active & (~after.mask)[None, :]", "active & False", STEP),
        "dhn of the features dropped": ("dh += at_end.to(ACC)", "dh += 0 * at_end.to(ACC)", WITHIN),
        "features across a reset": (
            "project_gradient(own, next_rows, next_mask,",
            "project_gradient(own, next_rows, at.mask & after.mask,",
            WITHIN_RESET,
        ),
        "dhn of the longest rows only": ("active & (~after.mask)[None, :]", "active & (step == 0)", PACKED_STEP),
    },
    "kernels/rows.py": {
        "order of the reverse direction": ("tl.where(rows.backwards, rows.last - step, step)", "step", REVERSE),
        "order of the reverse direction, backward": (
            "locate(time_of(rows.last - step, rows),",
            "locate(rows.last - step,",
            REVERSE_STEP,
        ),
        "h of the wrong neighbour": ("tl.where(rows.backwards, t + 1, t - 1)", "t", REVERSE_STEP),
        "dgates of the wrong neighbour": ("tl.where(rows.backwards, t - 1, t + 1)", "t", REVERSE_STEP),
        "cell of the wrong neighbour": (
            "before = locate(time_before(at.t, rows),",
            "before = locate(at.t,",
            REVERSE_STEP,
        ),
        "hn from the wrong end": (
            "end = tl.where(rows.backwards, 0, rows.length - 1)",
            "end = rows.length - 1",
            REVERSE_STEP,
        ),
        "end of a row without steps": ("tl.where(rows.length > 0,", "tl.where(rows.length >= 0,", WITHIN_LENGTHS),
        "end of a row without steps, in registers": (
            "tl.where(rows.length > 0,",
            "tl.where(rows.length >= 0,",
            LENGTHS,
        ),
        "the order of steps and rows": ("batch_offsets = batch * sizes.row_stride", "batch_offsets = batch", WITHIN),
        "the order of steps and rows, in registers": (
            "batch_offsets = batch * sizes.row_stride",
            "batch_offsets = batch",
            LAYERS,
        ),
    },
    "kernels/row_tiles.py": {"one part for all": ("second if k >= PARTS // 2 else first", "first", IN_PARTS)},
    "kernels/short_cell.py": {
        "forget gate for its complement": ("1.0 - sigmoid(-pre.f)", "sigmoid(-pre.f)", IN_TURN),
        "tanh of half the range": ("2.0 * sigmoid(2.0 * x) - 1.0", "2.0 * sigmoid(x) - 1.0", IN_TURN),
        "dc without the output gate's part": ("dc + dh * o * (1.0 -", "dc + dh * (1.0 -", IN_TURN),
    },
    "kernels/throughput_forward.py": {
        "a cell that is never written": (
            "tl.store(cn + part.state, c_next,",
            "tl.store(cn + part.state, c_next * 0,",
            IN_TURN,
        ),
        "two gates in each other's place": ("(0, 4, 3, 5, 1, 2)", "(0, 4, 3, 5, 2, 1)", IN_TURN),
        "gates of another unit": ("row // 2 % 4 * OF_THREAD", "row // 2 % 2 * OF_THREAD", IN_TURN),
        "rows of the other half": ("row // 8 % 2 * (BLOCK_B // 2)", "(1 - row // 8 % 2) * (BLOCK_B // 2)", IN_TURN),
        "a chunk too early": (
            "sum = add_product(sum, resident[k], x_k",
            "sum = add_product(sum, resident[k], x",
            IN_TURN,
        ),
    },
    "kernels/throughput_backward.py": {
        "dc past the forget gate": (
            "tl.store(dc0 + part.state, dc_prev,",
            "tl.store(dc0 + part.state, part.dc,",
            IN_TURN,
        ),
    },
    "kernels/saved.py": {
        "c0 taken from c": ("c0 + rows.states * H)", "c + at.rows * H)", STEP),
        "cell from before a reset": ("tl.where(at.start, c_reset + rows.states * H, c_rows)", "c_rows", RESET_STEP),
        "dc across a reset": ("return tl.where(start, 0.0, dc_prev),", "return dc_prev,", RESET_STEP),
        "dc_reset dropped": ("dc_reset += tl.where(start, dc_prev, 0.0)", "dc_reset += 0.0", RESET_STEP),
        "dc_reset dropped, in registers": ("dc_reset += tl.where(start, dc_prev, 0.0)", "dc_reset += 0.0", RESET),
    },
    "kernels/latency_forward.py": {
        "h0 taken as zero": ("h_tile = tl.load(", "h_tile = 0 * tl.load(", ONE_ROW),
        "cell kept in the dtype of h": (
            "active, c_next, c_tile",
            "active, c_next.to(y.dtype.element_ty).to(ACC), c_tile",
            FLOAT32_CELL,
        ),
        "cell of rows that have ended": ("tl.where(active, c_next, c_tile)", "c_next", PACKED),
        "h of rows that have ended": ("tl.where(active, h, h_tile)", "h", REVERSE),
        "the layer below a step late": (
            "y_below + at.first * H + offsets",
            "y_below + before.first * H + offsets",
            ONE_LAUNCH,
        ),
        "bias of the layer below": ("stack.bias + below * (4 * H)", "stack.bias + 0 * below", ONE_LAUNCH),
        "h without dropout for the layer above": ("y_below = y if dropped is None else dropped", "y_below = y", MASKS),
        "a reset that keeps h": ("tl.where(at.start[None, None, :], 0.0, recurrent)", "recurrent", RESET_POLLED),
        "a reset that keeps h in the program": ("tl.where(after.start[:, None], 0.0, h_tile)", "h_tile", RESET),
        "a reset that keeps c": ("tl.where(at.start[:, None], c_reset_tile, c_tile)", "c_tile", RESET),
        "two gates in each other's place": ("(3, 2, 0, 1)", "(3, 2, 1, 0)", ONE_ROW),
        "half of the units of a gate": ("index // BLOCK_H * H + index % BLOCK_H", "index // BLOCK_H * H", ONE_ROW),
        "the scale of 8 bits": ("BLOCK_B), scales)\n        if STACK", "BLOCK_B), None)\n        if STACK", OF_NARROW),
        "the scale of rows that begin later": (
            "first_product = scale_gates(sum_gates(recurrent, SPLIT, BLOCK_H, BLOCK_B), scales)",
            "first_product = sum_gates(recurrent, SPLIT, BLOCK_H, BLOCK_B)",
            NARROW_SCHEDULE,
        ),
        "an h0 in float16": ("step_begin, NARROW, FORM, TYPE)", "step_begin, NARROW, FORM, HALF)", LARGE_H0),
    },
    "kernels/narrow.py": {
        "columns past the last": (
            "mask[None, :, None] & (columns < FORM.K), other",
            "mask[None, :, None], other",
            OF_NARROW,
        ),
        "a bit of a number": ("third, 0xff7fff7f", "third, 0xff7fff7e", EVERY_NUMBER),
    },
    "kernels/latency_backward.py": {
        "dc of rows that have ended": ("tl.where(active, dc_prev, dc)", "dc_prev", PACKED),
        "gradient past what was dropped": ("dh = drop(dh,", "drop(dh,", MASKS),
        "dgates across a reset": ("tl.where(cut_rows[None, None, :], 0.0, recurrent)", "recurrent", RESET_POLLED),
        "dgates across a reset in the program": ("active & ~at.start[:, None]", "active", RESET),
        "two gates in each other's place": ("tl.join(i, g), tl.join(f, o)", "tl.join(i, f), tl.join(g, o)", ONE_ROW),
        "a quarter of the gates": ("parts % 4 * BLOCK_H +", "parts % 2 * BLOCK_H +", ONE_ROW),
    },
    "kernels/operands.py": {
        "one operand as it lies": (
            "in_registers(operand(x, PRECISION, True), SPLIT, M, BITS, FORM.K_WIDTH)",
            "x",
            POLLED,
        ),
        "a part of a sum": ("x = a + b\n    return", "x = a\n    return", POLLED),
    },
    "kernels/dropout.py": {
        "the layers' masks the same": ("zero + layer.to(tl.uint32)", "zero", MASKS),
        "what is kept not scaled": ("x.to(share.dtype) / share", "x.to(share.dtype)", MASKS),
    },
    "kernels/one_step.py": {
        "the slot of another layer": ("NET.first_output + at.layer - 1", "NET.first_output", STACKED_STEP),
        "a bias is left out": ("add_gates(cast_gates(bias, ACC), other_bias)", "cast_gates(bias, ACC)", STACKED_STEP),
        "16 bytes of rows that they do not divide": ("row * size % 16 == 0", "row * size % 4 == 0", NARROW_STEP),
        "16 bytes from where they are not aligned": ("[aligned(code)]", "[True]", MISALIGNED_STEP),
    },
    "kernels/step_products.py": {
        "chunks of a loop": (
            "FIRST: tl.constexpr = looped(FORM, BITS, NET.at_once)",
            "FIRST: tl.constexpr = 0",
            LONG_STEP,
        ),
        "the chunks that are held": ("(held[k],)", "(held[0],)", LONG_STEP),
    },
    "fused_lstm/quantized.py": {
        "the nearest integer": ("q.round()", "q.trunc()", NEAREST),
    },
    "kernels/exchange.py": {"the halves take no turns": ("self.turn = 1 -", "self.turn = 0 *", STEP_SCHEDULE)},
    "fused_lstm/session.py": {
        "a reset of all rows": ("torch.where(which, initial, state)", "initial", IN_SESSION),
        "a state that stays": ("self.turn = 1 - turn", "self.turn = turn", IN_SESSION),
        "training mode": ("module.training = False", "pass", DROPOUT_IN_SESSION),
    },
    "kernels/scan.py": {
        "order of the reverse direction": ("t = length - 1 - step if REVERSE else step", "t = step", RECOMPUTED),
        "a reset that keeps c": ("tl.load(layout.starts + row) != 0, c_reset_tile", "False, c_reset_tile", RECOMPUTED),
    },
    "kernels/sync.py": {
        "no acquire": ('sem="acquire"', 'sem="relaxed"', COMPILED),
    },
    "kernels/matmul.py": {
        "columns of the first chunk": ("k % CHUNKS * BLOCK_K + tl.arange", "tl.arange", STEP),
        "TF32 operands cut off": ("    x = operand(x, PRECISION, PIPELINED)\n", "", TF32),
    },
    "kernels/launch.py": {
        "padding left as it was": ("like.new_zeros(shape) if layout.padded else", "", PADDED),
        "loads of the next step before its flag": ('"num_stages": 1', '"num_stages": 3', COMPILED),
    },
    "kernels/layout.py": {
        "scales of the other weight": ("scales[k::2]", "scales[1 - k :: 2]", EIGHT_BITS),
        "rows dealt as they come": ("argsort(descending=True)", "new_ones(0).argsort().new_tensor(range(4))", DEALT),
    },
    "fused_lstm/recurrence.py": {
        "h0 of the resets dropped": ("addcmul_(starts.to(x.dtype)", "addcmul_(0 * starts.to(x.dtype)", STATES),
        "end of a row without steps, projected": ("torch.where(without_steps, h0, hn)", "hn", PROJECTED),
    },
    "fused_lstm/gradients.py": {
        "input of an upper layer without dropout": (
            "how.drop(every_y[k - 1], k - 1, B) if",
            "every_y[k - 1] if",
            MASKS,
        ),
        "bias gradient without the first step": ("dgates.sum(0,", "dgates[B:].sum(0,", LAYERS),
        "W_hh gradient without h0": ("matmul_tn(first, h0[k],", "matmul_tn(0 * first, h0[k],", LAYERS),
        "W_hh gradient across a reset": ("dgates.masked_fill_(starts, 0)", "dgates", RESET_TO_ZERO),
        "W_hh gradient across two rows": ("dgates[first_rows] = 0", "dgates[first_rows]", LAYERS),
        "h0 gradient without the resets": ("(dgates * starts).view", "(0 * dgates * starts).view", STATES),
        "gradient of a row without steps": ("torch.where(without_steps, cotangents.hn[k], dh)", "dh", LENGTHS),
        "W_hr gradient without the recurrence": (
            "matmul_tn(by_steps, h[previous_rows], by_outputs, accumulate)",
            "by_outputs",
            PROJECTION,
        ),
        "W_hr gradient without the recurrence, in the kernel": (
            "how.unbind(dh_steps, R)",
            "how.unbind(cotangents.y, R)",
            WITHIN,
        ),
        "W_hr gradient of the padding": ("h.masked_fill(layout.past(h.shape), 0) if", "h if", PROJECTED),
    },
    "fused_lstm/sequence.py": {
        "cut one step late in the other direction": ("[starts[1:], torch.zeros_like(starts[:1])]", "[starts]", STATES),
        "cut where the other direction begins": ("starts &= following <", "following <", BOTH),
        "hn from the wrong end": (
            "(last, first, previous, later) if",
            "(last, last, previous, later) if",
            OF_PROJECTED,
        ),
        "the end of rows that follow each other": ("rows // B - 1, rows", "rows // B - 2, rows", OF_PROJECTED),
    },
    "fused_lstm/chunks.py": {
        "no gradient from the chunk after": (
            "torch.cat([grads.inputs.h0[0],",
            "torch.cat([0 * grads.inputs.h0[0],",
            RECOMPUTED,
        ),
        "weights of one chunk": ("else total.add_(grad)", "else grad", RECOMPUTED),
        "h across a reset": ("h_prev = h_prev * ~sequence", "_ = h_prev * ~sequence", RECOMPUTED),
        "h0 taken for the state between chunks": ("else (b.h_between[k - 1, :B],", "else (a.h0[:B],", RECOMPUTED),
        "resets' gradients dropped": ("dh + dh_reset[0], dc + dc_reset[0]", "dh, dc", RECOMPUTED),
    },
    "fused_lstm/autograd.py": {
        "c0 gradient without the resets": ("dc0 = dc0 + dc_reset", "dc0 = dc0", STATES),
        "h0 gradient without the resets": ("dh0 = dh0 + dh_reset", "dh0 = dh0", STATES),
    },
    "kernels/recurrent_forward.py": {
        "h of a reset row": ("tl.where(at.start, resets[0], tensor)", "tensor", CELL_RESET),
        "states of rows that have ended": ("select_each(active, after, states)", "after", CELL_RESET),
    },
    "kernels/recurrent_backward.py": {
        "what the cell hands back to h is lost": ("(dh + dh_end + ds[0],)", "(dh + dh_end,)", OF_CELL),
        "a reset's gradient goes on": ("select_each(start, zeros_like_each(ds_t), ds_t)", "ds_t", CELL_RESET),
    },
    "kernels/recurrent_latency_forward.py": {
        "one gate of each unit": ("(slots * H + units) * H + columns", "(units) * H + columns", OF_CELL_LOCAL),
        "h of a reset row": ("tl.where(after.start[:, None], reset_to[0], h)", "h", CELL_RESET_LOCAL),
        "states of rows that have ended": ("select_each(active, ended, states)", "ended", CELL_RESET_LOCAL),
    },
    "kernels/recurrent_latency_backward.py": {
        "a unit's gates in each other's place": (
            "rows % PADDED, rows // PADDED",
            "(rows + 1) % PADDED, rows // PADDED",
            OF_CELL_LOCAL,
        ),
        "dr across a reset": ("active & ~at.start[:, None]", "active", CELL_RESET_LOCAL),
        "what the cell hands back to h is lost": (
            "(dh + dh_end.to(ACC) + ds[0],)",
            "(dh + dh_end.to(ACC),)",
            OF_CELL_LOCAL,
        ),
    },
    "kernels/states.py": {
        "the state before that of a reset": ("tl.where(at.start, resets[k], tensor)", "tensor", CELL_RESET),
    },
    "kernels/slots.py": {
        "gates in each other's place": ("every + (evens[k], odds[k])", "every + (odds[k], evens[k])", OF_CELL),
    },
    "kernels/elementwise.py": {
        "a sign in the logarithm of the sigmoid": ("minimum(x, 0.0) - log1p", "minimum(x, 0.0) + log1p", PRINTED),
    },
    "fused_lstm/cells/tracing.py": {
        "the slope of tanh": ('b.make("mul", y, y)))', "y))", PRINTED),
    },
    "fused_lstm/cells/printing.py": {
        "the numbers that are kept in another order": ('f"saved[{k}]"', 'f"saved[{k - 1}]"', PRINTED),
    },
    "fused_lstm/cells/recurrence.py": {
        "gates that are apart taken for the recurrent ones": (
            "gates[cell.gates.index(gate)] = of_gate",
            "pass",
            OF_LAYER,
        ),
        "h0 gradient without what the cell hands back": ("dstates[0] + torch.stack(dh0)", "torch.stack(dh0)", OF_LAYER),
    },
    "fused_lstm/cells/layers.py": {
        "states of the rows of a chunk given to all": ("[end, old[:, rows:]]", "[end, end[:, rows:]]", IN_CHUNKS),
    },
    "fused_lstm/composed.py": {
        "a reset that keeps the states": ("torch.where(start, *each)", "each[1]", STATES),
        "a state of rows that have ended": ("torch.where(inside, *each)", "each[0]", STATES),
        "two gates in each other's place": ("torch.cat([i, f, g, o]", "torch.cat([i, g, f, o]", TRACE),
    },
    "fused_lstm/segments.py": {
        "hx where a reset is": ("first & ~starts[0, row]", "first", RESET_TO_ZERO),
        "ends of the other direction": (
            "last.nonzero()[:, 0], first.nonzero()",
            "last.nonzero()[:, 0], last.nonzero()",
            RESET_TO_ZERO,
        ),
    },
    "fused_lstm/paths/in_graph.py": {
        "the first layer's states given to all": ("[group * D : (group + 1) * D]", "[:D]", IN_GRAPH),
        "gradients in each other's place": ("of_h0, of_c0, *of_weights = (", "of_c0, of_h0, *of_weights = (", IN_GRAPH),
    },
    "fused_lstm/context.py": {
        "a gradient that another level wants": ("saves = saves or (", "saves = saves and (", LEVEL),
        "a derivative that goes along": ("_functorch.TransformType.Jvp in kinds", "False", ALONG),
    },
    "fused_lstm/masks.py": {
        "a reset at a skipped step lost": (
            "self.reset.cumsum(0).gather(0, self.order)",
            "self.reset.gather(0, self.order).cumsum(0)",
            MASK_RESET,
        ),
        "a reset after the last step lost": ("if last is not None:", "if False:", MASK_RESET),
        "a reset before the reverse direction lost": ("if not to_hx:", "if False:", MASK_RESET),
        "cuts of the other direction": ("front[1:].any(0))", "front.any(0))", MASK_RESET),
        "steps past the end": ("mask = mask & inside", "mask = mask", MASK_RESET),
        "y past the end held": ("r if past is None else r | past", "r", MASK_PAST),
        "what stands before the first step": ("[self.upto == 0, ", "[self.upto < 0, ", MASK_TO_HX),
        "a reset state held as it was": ("initials[0], 0)", "initials[0], 99)", MASK_HELD),
    },
    "fused_lstm/route.py": {
        "8 bits where there are gradients": ("asked = form.context.saves or", "asked =", MADE_WIDE),
        "a cell in the precision of nn.LSTM": ("_OF_MATMUL.fp32_precision", "_OF_RNN.fp32_precision", SWITCH),
    },
    "fused_lstm/paths/layers.py": {
        "dropout after the last layer": (" and begin < options.num_layers * D", "", DROPOUT),
        "gates of the padding as they were": ("gates = gates.masked_fill(", "gates.masked_fill(", TRACE_OF_PADDING),
    },
    "fused_lstm/lstm.py": {
        "hx in the caller's order": ("self.permute_hidden(hx, permutation)", "hx", UNSORTED),
        "hn in the packed order": ("self.permute_hidden(hidden, unsorted_indices)", "hidden", UNSORTED),
    },
    "fused_lstm/stand_in.py": {
        "another mask than the kernels'": ("0xCD9E8D57", "0xCD9E8D5B", STOOD_IN),
        "the layers above given what is below them": (
            "stack.weight_ih[r - 1], stack",
            "stack.weight_ih[0], stack",
            STOOD_IN,
        ),
    },
    "fused_lstm/tuning.py": {
        "wrong numbers taken": (
            "off.max().item()) > TOLERANCE",
            "off.max().item()) < -TOLERANCE",
            "test_tuning.py::test_wrong_numbers_are_refused",
        ),
    },
    "kernels/findings.py": {
        "a refused kernel asked for again": ("if one not in self.refused]", "]", REFUSED),
        "what does not last remembered": (
            "if lasts:",
            "if True:",
            "test_refusals.py::test_what_lasts_is_known_to_the_next_process",
        ),
    },
    "kernels/limits.py": {
        "more programs than run at once": ("programs > device.multiprocessors,", "False,", RESIDENT),
        "a device taken for checked that nobody checked": ("return known and TRITON", "return TRITON", CHECKED),
    },
    "kernels/choice.py": {
        "the slowest kernel by the model": ("(model.step(terms, mode", "(-model.step(terms, mode", LARGE),
    },
    "fused_lstm/trace.py": {
        "two gates in each other's place": ("i, f, g, o = zip(", "i, g, f, o = zip(", TRACE),
        "layers taken for directions": (
            "layer.num_layers, directions))",
            "directions, layer.num_layers)).transpose(-3, -2)",
            TRACE,
        ),
    },
    "fused_lstm/reference.py": {
        "derivative of a gate": ("dg = dc_t * i * (1 - g**2)", "dg = dc_t * i * (1 - g)", DERIVATIVE),
    },
}

if VERSION < (3, 9):  # which sets this barrier itself
    release = "tl.atomic_add(flag, 1"
    FAULTS["kernels/sync.py"]["no barrier before the release"] = (
        f"tl.debug_barrier()\n    {release}",
        release,
        COMPILED,
    )

# Files that serve torch's path: their tests run on it.
ON_TORCH = ("fused_lstm/composed.py", "fused_lstm/paths/in_graph.py", "fused_lstm/segments.py")


@pytest.fixture
def tree(tmp_path):
    """A copy of the package, its tests, and what they import."""
    # Where the package runs uninstalled, fused_lstm/kernels is a link.
    unwanted = shutil.ignore_patterns("__pycache__", "kernels", "results")
    for folder in ("fused_lstm", "tests", "bench"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=unwanted)
    shutil.copytree(ROOT / "kernels", tmp_path / "fused_lstm/kernels", ignore=unwanted)
    return tmp_path


@pytest.fixture(scope="module")
def servers():
    """The server processes: in the interpreter, and on torch's path."""
    running = {}
    for interpret in ("1", "0"):
        environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", "TRITON_INTERPRET": interpret}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # Not from the root: it would come before the copy on the path of imports.
        running[interpret] = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=Path(sys.executable).parent, env=os.environ | environment, **pipes
        )
    yield running
    for server in running.values():
        server.stdin.close()
        server.wait()


def outcome(servers, tree, *tests, on_torch=False):
    """pytest's exit status and output over these tests of the copy, in the interpreter or on torch's path."""
    server = servers["0" if on_torch else "1"]
    arguments = ["-xq", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]
    print(json.dumps([str(tree), *arguments]), file=server.stdin, flush=True)
    return int(server.stdout.readline()), (tree / "output.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("file,fault", [(file, fault) for file, faults in FAULTS.items() for fault in faults])
def test_fault_is_caught(file, fault, tree, servers):
    old, new, test = FAULTS[file][fault]
    path = tree / file.replace("kernels/", "fused_lstm/kernels/")
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
    path.write_text(text.replace(old, new), encoding="utf-8")
    status, output = outcome(servers, tree, test, on_torch=file in ON_TORCH)
    assert status == pytest.ExitCode.TESTS_FAILED and re.search(r"\b1 failed\b", output), output


def test_without_a_fault_the_same_tests_pass(tree, servers):
    tests = {test for faults in FAULTS.values() for _, _, test in faults.values()}
    status, output = outcome(servers, tree, *sorted(tests))
    assert status == pytest.ExitCode.OK and f"{len(tests)} passed" in output, output
