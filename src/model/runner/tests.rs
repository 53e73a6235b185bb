//! Refusals of steps that contradict themselves, and of single rows. What a good step computes is tested in
//! `model::parity`.

use super::*;
use crate::kernels::{Ops, Precision};
use crate::model::Spec;
use crate::model::init::fresh;
use crate::model::spec::{Gate, Moe};
use crate::model::step::{SampleRow, ScoreRow, Slice};
use crate::request::Params;
use candle_core::DType;
use candle_nn::VarBuilder;
use std::collections::BTreeMap;
use std::sync::Arc;

const BLOCKS: usize = 8;
const BLOCK_SIZE: usize = 4;
const CONTEXT: usize = 16;
const VOCAB: usize = 50;

fn runner_over(edit: impl Fn(&mut BTreeMap<String, Tensor>)) -> CandleRunner {
    runner_of(None, edit)
}

fn runner_of(moe: Option<Moe>, edit: impl Fn(&mut BTreeMap<String, Tensor>)) -> CandleRunner {
    let spec = Spec {
        layers: 2,
        heads: 2,
        width: 8,
        inner: 16,
        context: CONTEXT,
        vocab: VOCAB,
        eps: 1e-5,
        eos: Vec::new(),
        tasks: Vec::new(),
        moe,
    };
    let mut tensors = fresh(&spec, 1).unwrap();
    edit(&mut tensors);
    let vb = VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
    let ops = Ops::new(&Device::Cpu, Precision::F32);
    let decoder = Decoder::packed(&spec, vb, ops, ops.precision).unwrap();
    CandleRunner::new(decoder, BLOCKS, BLOCK_SIZE).unwrap()
}

fn sample(row: usize, params: Params) -> SampleRow {
    SampleRow {
        row,
        sampling: Arc::new(params.sampling()),
        seed: 1,
        index: 0,
        history: Vec::new(),
        prompt_len: 0,
        banned: Vec::new(),
        allowed: None,
    }
}

/// Two sequences: five rows from position 0, one row at position 6.
fn good() -> StepInput {
    StepInput {
        tokens: vec![1, 2, 3, 4, 5, 6],
        positions: vec![0, 1, 2, 3, 4, 6],
        slices: vec![
            Slice { rows: 0..5, table: 0..2, gate: None },
            Slice { rows: 5..6, table: 2..4, gate: None },
        ],
        block_tables: vec![7, 0, 3, 1],
        adapters: Vec::new(),
        samples: vec![sample(4, Params::default()), sample(5, Params::default())],
        scores: vec![ScoreRow { row: 0, target: 2, top: 3 }],
    }
}

/// Rows with a mix of nothing.
fn adapted(rows: Range<usize>) -> AdapterRows {
    AdapterRows { rows, mix: Arc::new(Mix { key: 1, parts: Vec::new() }) }
}

#[test]
fn answers_in_the_order_asked() {
    let mut runner = runner_over(|_| {});
    let output = runner.step(&good()).unwrap();
    assert_eq!(output.sampled.len(), 2);
    assert_eq!(output.scored.len(), 1);
    assert_eq!(output.scored[0].as_ref().unwrap().top.len(), 3);
    let nothing = runner.step(&StepInput::default()).unwrap();
    assert!(nothing.sampled.is_empty() && nothing.scored.is_empty());
}

#[test]
fn more_rows_than_logits_are_held_for() {
    let mut runner = runner_over(|_| {});
    let mut input = good();
    input.scores =
        (0..3 * LOGIT_ROWS + 1).map(|i| ScoreRow { row: i % 6, target: 2, top: 0 }).collect();
    let scored = runner.step(&input).unwrap().scored;
    assert_eq!(scored.len(), 3 * LOGIT_ROWS + 1);
    assert!(scored.iter().enumerate().all(|(i, s)| s.is_ok() && *s == scored[i % 6]));
}

#[test]
fn contradictions_are_errors() {
    type Edit = fn(&mut StepInput);
    let cases: [(&str, Edit); 21] = [
        ("5 positions for 6", |s| s.positions.truncate(5)),
        ("token 50", |s| s.tokens[0] = VOCAB as u32),
        ("do not follow", |s| s.slices.swap(0, 1)),
        ("do not follow", |s| s.slices[1].rows = 5..7),
        ("do not follow", |s| s.slices[0].rows = 0..0),
        ("cover 5 of 6", |s| s.slices.truncate(1)),
        ("out of range", |s| s.slices[1].table = 2..9),
        ("not consecutive", |s| s.positions[1] = 0),
        ("outside a context", |s| s.positions[5] = CONTEXT as u32),
        ("outside a context", |s| s.positions[5] = u32::MAX),
        ("no block", |s| s.slices[0].table = 0..1),
        ("gate task 0", |s| s.slices[1].gate = Some(0)),
        ("no block", |s| s.block_tables[3] = BLOCKS as u32),
        ("ends no slice", |s| s.samples[0].row = 3),
        ("ends no slice", |s| s.samples[0].row = usize::MAX),
        ("no history", |s| {
            s.samples[0] = sample(4, Params { presence_penalty: Some(1.0), ..Params::default() });
        }),
        ("do not follow row 0", |s| s.adapters = vec![adapted(2..2)]),
        ("do not follow row 0", |s| s.adapters = vec![adapted(5..7)]),
        ("do not follow row 3", |s| s.adapters = vec![adapted(0..3), adapted(2..6)]),
        ("do not follow row 6", |s| s.adapters = vec![adapted(3..6), adapted(0..3)]),
        ("row 6 is scored", |s| s.scores[0].row = 6),
    ];
    let mut runner = runner_over(|_| {});
    for (message, edit) in cases {
        let mut input = good();
        edit(&mut input);
        let error = runner.step(&input).unwrap_err().to_string();
        assert!(error.contains(message), "{error}, not {message}");
    }
    runner.step(&good()).unwrap();
}

#[test]
fn what_one_row_cannot_have_leaves_the_others_alone() {
    let mut runner = runner_over(|_| {});
    let good_output = runner.step(&good()).unwrap();
    let mut input = good();
    input.samples[0].banned = vec![VOCAB as u32];
    input.scores.insert(0, ScoreRow { target: VOCAB as u32, ..good().scores[0] });
    let output = runner.step(&input).unwrap();
    for error in [output.sampled[0].as_ref().err(), output.scored[0].as_ref().err()] {
        assert!(error.unwrap().contains("outside a vocabulary"), "{error:?}");
    }
    assert_eq!(
        (&output.sampled[1], &output.scored[1]),
        (&good_output.sampled[1], &good_output.scored[0])
    );
}

#[test]
fn logits_that_are_not_finite_fail_their_rows() {
    let mut runner = runner_over(|tensors| {
        let name = "transformer.ln_f.bias";
        let poison = Tensor::full(f32::NAN, tensors[name].shape(), &Device::Cpu).unwrap();
        tensors.insert(name.into(), poison);
    });
    let output = runner.step(&good()).unwrap();
    let errors = output.sampled.iter().filter_map(|row| row.as_ref().err());
    let errors = errors.chain(output.scored.iter().filter_map(|row| row.as_ref().err()));
    assert_eq!(errors.filter(|error| error.contains("not finite")).count(), 3);
}

/// The engine relies on it when it plans: a block may be shared in the very step that fills it.
#[test]
fn a_row_sees_what_another_sequence_writes_in_the_same_step() {
    let experts = Moe { layers: vec![0, 1], experts: 3, top_k: 1, gate: Gate::Token };
    for moe in [None, Some(experts)] {
        let mut runner = runner_of(moe, |_| {});
        let tokens = [11, 12, 13, 14, 15, 16, 17];
        let input = |slices: &[(Range<usize>, [u32; 2])]| {
            let mut input = StepInput::default();
            for (positions, table) in slices {
                let row = input.tokens.len();
                input.tokens.extend_from_slice(&tokens[positions.clone()]);
                input.positions.extend(positions.clone().map(|position| position as u32));
                let table_at = input.block_tables.len();
                input.block_tables.extend(table);
                let (rows, table) = (row..input.tokens.len(), table_at..table_at + 2);
                let last = rows.end - 1;
                input.slices.push(Slice { rows, table, gate: None });
                input.scores.push(ScoreRow { row: last, target: 1, top: 5 });
            }
            input
        };
        let alone = runner.step(&input(&[(0..7, [0, 1])])).unwrap().scored.remove(0).unwrap();
        // The second has no first block of its own.
        let (writer, reader) = ((0..6, [2, 3]), (4..7, [2, 4]));
        for (slices, place) in [([writer.clone(), reader.clone()], 1), ([reader, writer], 0)] {
            // What block 2 had before is another text's.
            runner.step(&input(&[(3..6, [5, 2])])).unwrap();
            let scored = runner.step(&input(&slices)).unwrap().scored.remove(place).unwrap();
            assert_eq!(scored, alone);
        }
    }
}
