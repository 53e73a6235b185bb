//! The engine through its handle, on its own thread. Where a test must catch the engine in the middle of
//! something, it holds it at a gate.

use super::*;
use crate::engine::State;
use crate::engine::fake::StepGate;
use crate::error::Kind;
use crate::model::step::{Capacity, StepError, StepInput, StepOutput};
use std::time::Duration;

fn one_at_a_time() -> Settings {
    Settings { max_running: 1, ..Settings::default() }
}

fn gated(slo: Slo, settings: Settings) -> (EngineHandle, JoinHandle<()>, StepGate) {
    let (runner, gate) = FakeRunner::small().gated();
    let (handle, thread) = ready(move || runner, slo, settings);
    (handle, thread, gate)
}

fn kind<T>(result: crate::error::Result<T>) -> Option<Kind> {
    result.err().map(|error| error.kind)
}

#[test]
fn a_job_hears_its_tokens_and_one_end() {
    let fake = FakeRunner::small();
    let (handle, _thread) = ready(FakeRunner::small, Slo::default(), Settings::default());
    let heard = listen(handle.submit(job([1, 2, 3], 20)).unwrap());
    assert_eq!(heard.tokens, fake.alone(&[1, 2, 3], 20, 0, &[]));
    assert_eq!(heard.finish, Some(Finish::Length));

    let stop = heard.tokens[7];
    let first = heard.tokens.iter().position(|&token| token == stop).unwrap();
    let stopping = Job { stop_ids: Arc::new([stop]), ..job([1, 2, 3], 20) };
    let stopped = listen(handle.submit(stopping.clone()).unwrap());
    assert_eq!(
        (stopped.tokens.as_slice(), stopped.finish),
        (&heard.tokens[..first], Some(Finish::EndToken))
    );
    assert_eq!((heard.stop, stopped.stop), (None, Some(Sampled { token: stop, logprob: None })));
    let params = Params { temperature: Some(0.0), logprobs: Some(2), ..Params::default() };
    let sampling = Arc::new(params.sampling());
    let stopped = listen(handle.submit(Job { sampling, ..stopping.clone() }).unwrap());
    let score = stopped.stop.unwrap().logprob.unwrap();
    assert_eq!((score.token, score.top.len()), (stop, 2));

    let longer = listen(handle.submit(Job { min_new: 20, ..stopping }).unwrap());
    assert_eq!(longer.tokens, fake.alone(&[1, 2, 3], 20, 20, &[stop]));
    assert_eq!((longer.tokens.len(), longer.finish), (20, Some(Finish::Length)));
}

#[test]
fn prompts_are_scored_position_by_position() {
    let fake = FakeRunner::small();
    let settings = Settings { prefill_chunk: 3, ..Settings::default() };
    let (handle, _thread) = ready(FakeRunner::small, Slo::default(), settings);
    let prompt: Vec<u32> = (10..21).collect();
    for max_new in [0, 4] {
        let scoring = Job { score_prompt: Some(2), ..job(prompt.clone(), max_new) };
        let heard = listen(handle.submit(scoring.clone()).unwrap());
        assert_eq!(heard.prompt, scores(&fake, &scoring));
        assert_eq!(heard.tokens, fake.alone(&prompt, max_new as usize, 0, &[]));
        assert_eq!(heard.finish, Some(Finish::Length));
    }
    let shortest = Job { score_prompt: Some(0), ..job([5], 0) };
    assert_eq!(listen(handle.submit(shortest).unwrap()).prompt, Some(vec![None]));
    assert_eq!(listen(handle.submit(job([5], 0)).unwrap()).prompt, None);
}

#[test]
fn labels_behind_one_prompt_are_scored_in_one_step_that_computes_it_once() {
    let (runner, gate) = FakeRunner::small().gated();
    let (handle, thread) = ready(move || runner, Slo::default(), Settings::default());
    let labels = [&[7][..], &[8, 9], &[8, 9, 10], &[7, 7]];
    let label = |label: &&[u32]| {
        let tokens: Vec<u32> = (0..40).chain(label.iter().copied()).collect();
        Job { score_prompt: Some(2), score_from: 40, ..job(tokens, 0) }
    };
    let jobs: Vec<Job> = labels.iter().map(label).collect();
    let events = handle.submit_all(jobs.clone()).unwrap();
    let step = gate.arrival().unwrap();
    let rows: Vec<usize> = step.slices.iter().map(|slice| slice.rows.len()).collect();
    // Two blocks of 16 are whole; a label's last token need not run.
    assert_eq!(rows, [40, 8 + 1, 8 + 2, 8 + 1]);
    assert_eq!(step.scores.len(), 1 + 2 + 3 + 2);
    drop(gate);
    let fake = FakeRunner::small();
    for (events, job) in events.into_iter().zip(&jobs) {
        let heard = listen(events);
        assert_eq!((&heard.prompt, heard.finish), (&scores(&fake, job), Some(Finish::Length)));
        assert_eq!(heard.prompt.unwrap().len(), job.tokens.len() - 40);
    }
    let nothing = Job { score_from: 41, ..jobs[0].clone() };
    assert_eq!(kind(handle.submit(nothing)), Some(Kind::Invalid));
    handle.drain();
    thread.join().unwrap();
}

#[test]
fn what_a_failed_step_was_to_compute_is_computed_again() {
    let prompt: Vec<u32> = (0..40).collect();
    let build = || FakeRunner::small().failing_at([0]);
    let (handle, _thread) = ready(build, Slo::default(), Settings::default());
    let jobs = vec![job(prompt.clone(), 9); 3];
    for heard in handle.submit_all(jobs.clone()).unwrap().into_iter().map(listen) {
        assert_eq!(heard.failed.map(|error| error.kind), Some(Kind::Internal));
    }
    for heard in handle.submit_all(jobs).unwrap().into_iter().map(listen) {
        assert_eq!(heard.tokens, FakeRunner::small().alone(&prompt, 9, 0, &[]));
    }
}

#[test]
fn work_is_refused_until_the_model_is_there() {
    let (load, loaded) = std::sync::mpsc::channel::<()>();
    let table = tasks([Slo::default()]);
    let build = move || {
        loaded.recv()?;
        Ok(FakeRunner::small())
    };
    let metrics = Arc::new(Metrics::new(&table.names()));
    let (handle, _thread) = start(build, &table, Settings::default(), metrics);
    assert_eq!((handle.state(), handle.capacity()), (State::Loading, None));
    assert_eq!(kind(handle.submit(job([1], 1))), Some(Kind::Unavailable));
    load.send(()).unwrap();
    wait_until_loaded(&handle);
    assert_eq!(handle.state(), State::Ready);
    assert_eq!(handle.capacity(), Some(FakeRunner::small().capacity()));
    assert_eq!(listen(handle.submit(job([1], 1)).unwrap()).tokens.len(), 1);
}

#[test]
fn a_drain_while_loading_ends_the_thread_after_it() {
    let (load, loaded) = std::sync::mpsc::channel::<()>();
    let table = tasks([Slo::default()]);
    let build = move || loaded.recv().map(|()| FakeRunner::small()).map_err(StepError::from);
    let metrics = Arc::new(Metrics::new(&table.names()));
    let (handle, thread) = start(build, &table, Settings::default(), metrics);
    handle.drain();
    load.send(()).unwrap();
    thread.join().unwrap();
    assert_eq!(handle.state(), State::Draining);
}

#[test]
fn metrics_count_what_happened() {
    let table = tasks([Slo::default(), Slo::default()]);
    let metrics = Arc::new(Metrics::new(&table.names()));
    let build = || Ok(FakeRunner::small().failing_at([30]));
    let (handle, thread) = start(build, &table, one_at_a_time(), metrics.clone());
    wait_until_loaded(&handle);
    let of = |task, word, max_new| Job { task: TaskId(task), ..job([word; 20], max_new) };
    let jobs = vec![of(0, 1, 10), of(0, 2, 10), of(1, 3, 10), of(1, 4, 1)];
    let events = handle.submit_all(jobs).unwrap();
    let tokens: Vec<usize> = events.into_iter().map(|e| listen(e).tokens.len()).collect();
    assert_eq!(tokens.iter().sum::<usize>(), 30, "step 30 failed the last to run: {tokens:?}");
    handle.drain();
    thread.join().unwrap();
    let task = |id| {
        let m = metrics.task(TaskId(id));
        [&m.queue, &m.prefill, &m.ttft, &m.inter_token].map(|h| h.get_sample_count())
    };
    let sum: Vec<u64> = task(0).iter().zip(task(1)).map(|(a, b)| a + b).collect();
    assert_eq!((task(0), sum), ([2, 2, 2, 18], vec![4, 3, 3, 27]));
    assert_eq!((metrics.running.get(), metrics.waiting.get(), metrics.kv_usage.get()), (0, 0, 0.0));
    assert_eq!((metrics.step_failures.get(), metrics.backlog.get()), (1, 0.0));
    let phases = [&metrics.step_prefill, &metrics.step_decode].map(|h| h.get_sample_count());
    assert_eq!(phases, [4, 27]);
    assert_eq!(metrics.step_rows.get_sample_sum(), 107.0, "four prompts of 20 and 27 decodes");
    assert_eq!(metrics.task(TaskId(0)).rows.get(), 58, "two prompts of 20 and 18 decodes");
}

#[test]
fn an_equal_beginning_is_computed_once_for_each_variant() {
    let table = tasks([Slo::default()]);
    let metrics = Arc::new(Metrics::new(&table.names()));
    let build = || Ok(FakeRunner::small());
    let (handle, thread) = start(build, &table, Settings::default(), metrics.clone());
    wait_until_loaded(&handle);
    let fake = FakeRunner::small();
    let prompt: Vec<u32> = (0..40).collect();
    let mut hits = Vec::new();
    for mix in [0, 0, 1, 2, 1] {
        let adapters = (mix > 0).then(|| Arc::new(Mix { key: mix, parts: Vec::new() }));
        let job = Job { adapters, ..job(prompt.clone(), 3) };
        let heard = listen(handle.submit(job.clone()).unwrap());
        assert_eq!(heard.tokens, fake.alone_as(&job).0);
        hits.push(metrics.prefix_hits.get());
    }
    // Two blocks of 16 are whole.
    assert_eq!(hits, [0, 32, 32, 32, 64]);
    assert_eq!(metrics.prefix_queries.get(), 5 * 39);
    handle.drain();
    thread.join().unwrap();
}

#[test]
fn a_task_may_come_while_others_run() {
    let table = tasks([Slo::default()]);
    let metrics = Arc::new(Metrics::new(&table.names()));
    let build = || Ok(FakeRunner::small());
    let (handle, thread) = start(build, &table, Settings::default(), metrics.clone());
    wait_until_loaded(&handle);
    let late = Job { task: TaskId(1), ..job([1, 2], 3) };
    assert_eq!(kind(handle.submit(late.clone())), Some(Kind::NotFound));
    let slo = Slo { max_waiting: 1, ..Slo::default() };
    handle.add_task(&slo, metrics.add_task("late")).unwrap();
    assert_eq!(listen(handle.submit(late).unwrap()).tokens.len(), 3);
    assert_eq!(metrics.task(TaskId(1)).ttft.get_sample_count(), 1);
    handle.drain();
    thread.join().unwrap();
}

#[test]
fn a_task_that_comes_while_the_model_loads_is_counted_under_its_own_name() {
    let table = tasks([Slo::default()]);
    let metrics = Arc::new(Metrics::new(&table.names()));
    let (load, may_load) = std::sync::mpsc::channel::<()>();
    let build = move || {
        may_load.recv()?;
        Ok(FakeRunner::small())
    };
    let (handle, thread) = start(build, &table, Settings::default(), metrics.clone());
    handle.add_task(&Slo::default(), metrics.add_task("early")).unwrap();
    load.send(()).unwrap();
    wait_until_loaded(&handle);
    handle.add_task(&Slo::default(), metrics.add_task("late")).unwrap();
    for task in [1, 2, 2] {
        listen(handle.submit(Job { task: TaskId(task), ..job([1, 2], 1) }).unwrap());
    }
    let rows = |task| metrics.task(TaskId(task)).rows.get();
    assert_eq!([rows(0), rows(1), rows(2)], [0, 2, 4]);
    handle.drain();
    thread.join().unwrap();
}

#[test]
fn a_runner_that_cannot_be_made_is_a_failed_engine() {
    fn build_fails(build: impl FnOnce() -> Result<FakeRunner, StepError> + Send + 'static) {
        let table = tasks([Slo::default()]);
        let metrics = Arc::new(Metrics::new(&table.names()));
        let (handle, thread) = start(build, &table, Settings::default(), metrics);
        thread.join().unwrap();
        assert_eq!(handle.state(), State::Failed);
        assert_eq!(kind(handle.submit(job([1], 1))), Some(Kind::Unavailable));
    }
    build_fails(|| Err("no weights".into()));
    build_fails(|| panic!("broken weights"));
    let nothing = Capacity { blocks: 0, block_size: 16, context: 128, vocab: 256 };
    build_fails(move || Ok(FakeRunner::new(nothing)));
}

#[test]
fn what_can_never_run_is_refused() {
    // 6 blocks of 4 positions: 24, and one more for the last token, which is never run.
    let small = || FakeRunner::new(Capacity { blocks: 6, block_size: 4, context: 40, vocab: 50 });
    let (handle, _thread) = ready(small, Slo::default(), Settings::default());
    assert_eq!(kind(handle.submit(job(vec![1; 20], 6))), Some(Kind::ContextLength));
    assert_eq!(kind(handle.submit(job(vec![1; 20], u32::MAX))), Some(Kind::ContextLength));
    assert_eq!(listen(handle.submit(job(vec![1; 20], 5)).unwrap()).tokens.len(), 5);
    assert_eq!(kind(handle.submit(job([], 6))), Some(Kind::Invalid));
    assert_eq!(kind(handle.submit(job([49, 50], 6))), Some(Kind::Invalid));
    let unknown = Job { task: TaskId(9), ..job([1], 1) };
    assert_eq!(kind(handle.submit(unknown)), Some(Kind::NotFound));
}

#[test]
fn a_place_in_the_queue_is_held_until_the_core_lets_go() {
    let slo = Slo { max_waiting: 2, ..Slo::default() };
    let (handle, _thread, gate) = gated(slo, one_at_a_time());
    let running = handle.submit(job([1], 2)).unwrap();
    gate.arrival().unwrap();
    let waiting = handle.submit(job([2], 1)).unwrap();
    assert_eq!(kind(handle.submit_all(vec![job([3], 1), job([4], 1)])), Some(Kind::Overloaded));
    let leaving = handle.submit(job([3], 1)).expect("all or none: nothing was taken");
    let full = handle.submit(job([4], 1)).unwrap_err();
    assert!(full.kind == Kind::Overloaded && full.retry_after >= Some(Duration::from_secs(1)));
    drop(leaving);
    assert_eq!(kind(handle.submit(job([4], 1))), Some(Kind::Overloaded), "still queued");
    gate.pass(1);
    gate.arrival().unwrap();
    let last = handle.submit(job([4], 1)).expect("the tick dropped the one that left");
    let queued = handle.submit(job([5], 1));
    assert_eq!(kind(queued), Some(Kind::Overloaded), "one waits in the core, one before it");
    drop(gate);
    for events in [running, waiting, last] {
        assert_eq!(listen(events).finish, Some(Finish::Length));
    }
}

#[test]
fn who_leaves_is_gone_at_the_next_tick() {
    let (handle, thread, gate) = gated(Slo::default(), Settings::default());
    let leaving = handle.submit(job([1; 40], 50)).unwrap();
    gate.arrival().unwrap();
    let staying = handle.submit(job([2; 40], 3)).unwrap();
    drop(leaving);
    gate.pass(1);
    let next = gate.arrival().unwrap();
    assert_eq!((next.slices.len(), next.tokens[0]), (1, 2));
    drop(gate);
    assert_eq!(listen(staying).tokens.len(), 3);
    drop(handle);
    thread.join().unwrap();
}

#[test]
fn rows_of_a_task_are_contiguous() {
    let table = tasks([Slo::default(), Slo::default()]);
    let (runner, gate) = FakeRunner::small().gated();
    let metrics = Arc::new(Metrics::new(&table.names()));
    let (handle, _thread) = start(move || Ok(runner), &table, Settings::default(), metrics);
    wait_until_loaded(&handle);
    let of = |task: u16| Job { task: TaskId(task), ..job([u32::from(task); 2], 4) };
    let _first = handle.submit(of(1)).unwrap();
    gate.arrival().unwrap();
    let _rest = handle.submit_all([0, 1, 0, 1].map(of).into()).unwrap();
    gate.pass(1);
    let input = gate.arrival().unwrap();
    assert_eq!(input.slices.len(), 5);
    let prefills: Vec<u32> = input
        .slices
        .iter()
        .filter(|s| s.rows.len() == 2)
        .map(|s| input.tokens[s.rows.start])
        .collect();
    assert_eq!(prefills, [0, 0, 1, 1]);
    assert_eq!(input.slices[2].rows.len(), 1, "the decode of task 1 stands with its task");
}

#[test]
fn history_goes_along_only_where_it_is_needed() {
    let (handle, _thread, gate) = gated(Slo::default(), Settings::default());
    let penalised = Params { presence_penalty: Some(0.5), ..Params::default() }.sampling();
    let needing = Job { sampling: Arc::new(penalised), ..job([7, 8], 2) };
    let _events = handle.submit_all(vec![needing, job([9], 2)]).unwrap();
    let histories = |input: StepInput| -> Vec<Vec<u32>> {
        input.samples.into_iter().map(|sample| sample.history).collect()
    };
    assert_eq!(histories(gate.arrival().unwrap()), [vec![7, 8], vec![]]);
    gate.pass(1);
    let second = histories(gate.arrival().unwrap());
    assert_eq!((&second[0][..2], second[0].len(), second[1].len()), (&[7, 8][..], 3, 0));
}

#[test]
fn a_drain_finishes_what_was_accepted_and_refuses_the_rest() {
    let (handle, thread, gate) = gated(Slo::default(), one_at_a_time());
    let running = handle.submit(job([1], 3)).unwrap();
    gate.arrival().unwrap();
    let queued = handle.submit(job([2], 3)).unwrap();
    handle.drain();
    assert_eq!(handle.state(), State::Draining);
    assert_eq!(kind(handle.submit(job([3], 3))), Some(Kind::Unavailable));
    drop(gate);
    assert_eq!(listen(running).tokens.len(), 3);
    assert_eq!(listen(queued).tokens.len(), 3);
    thread.join().unwrap();
    assert_eq!(handle.state(), State::Draining);
}

#[test]
fn without_a_handle_the_work_is_finished_and_the_thread_ends() {
    let (handle, thread) = ready(FakeRunner::small, Slo::default(), Settings::default());
    let events = handle.submit(job([1], 30)).unwrap();
    drop(handle);
    assert_eq!(listen(events).tokens.len(), 30);
    thread.join().unwrap();
}

#[test]
fn a_failed_step_fails_its_own_sequences_only() {
    for panics in [false, true] {
        let (runner, gate) = FakeRunner::small().gated();
        let runner = if panics { runner.panicking_at([1]) } else { runner.failing_at([1]) };
        let (handle, thread) = ready(move || runner, Slo::default(), one_at_a_time());
        let unlucky = handle.submit(job([1; 30], 9)).unwrap();
        gate.arrival().unwrap();
        let lucky = handle.submit(job([2; 100], 9)).unwrap();
        drop(gate);
        let heard = listen(unlucky);
        assert_eq!((heard.tokens.len(), heard.failed.unwrap().kind), (1, Kind::Internal));
        assert_eq!(listen(lucky).tokens, FakeRunner::small().alone(&[2; 100], 9, 0, &[]));
        assert_eq!(handle.state(), State::Ready);
        drop(handle);
        thread.join().unwrap();
    }
}

#[test]
fn a_row_without_an_answer_ends_its_own_sequence_only() {
    let table = tasks([Slo::default()]);
    let metrics = Arc::new(Metrics::new(&table.names()));
    let faulty = |tokens: &[u32]| tokens[0] == 66 && tokens.len() >= 10;
    let build = move || Ok(FakeRunner::small().failing_rows(faulty));
    let (handle, thread) = start(build, &table, Settings::default(), metrics.clone());
    wait_until_loaded(&handle);
    let scored = |tokens: [u32; 20]| Job { score_prompt: Some(2), ..job(tokens, 20) };
    let mut jobs = vec![scored([1; 20]), scored([66; 20]), scored([2; 20]), job([3; 20], 20)];
    // One more in each step from the second on.
    jobs.extend((1..10).rev().map(|words| job(vec![66; words], 20)));
    let events = handle.submit_all(jobs).unwrap();
    let heard: Vec<Heard> = events.into_iter().map(listen).collect();
    let fake = FakeRunner::small();
    for (i, word) in [(0, 1), (2, 2), (3, 3)] {
        let scores = if i < 3 { scores(&fake, &scored([word; 20])) } else { None };
        let heard = &heard[i];
        assert_eq!((&heard.tokens, &heard.prompt), (&fake.alone(&[word; 20], 20, 0, &[]), &scores));
        assert_eq!(heard.finish, Some(Finish::Length));
    }
    let poisoned = heard[4..].iter().chain([&heard[1]]);
    for (heard, tokens) in poisoned.zip((1..10).chain([0])) {
        let failed = heard.failed.as_ref().map(|error| (error.kind, error.to_string()));
        assert_eq!(failed, Some((Kind::Internal, "a row failed: made to fail".to_owned())));
        assert_eq!((heard.tokens.len(), &heard.prompt), (tokens, &None));
    }
    assert_eq!((handle.state(), metrics.step_failures.get()), (State::Ready, 0));
    handle.drain();
    thread.join().unwrap();
    assert_eq!((metrics.running.get(), metrics.kv_usage.get()), (0, 0.0), "blocks are lost");
}

#[test]
fn three_failed_steps_in_a_row_end_the_engine() {
    let (runner, gate) = FakeRunner::small().gated();
    let runner = runner.failing_at([0, 1, 3, 4]).panicking_at([5]);
    let (handle, thread) = ready(move || runner, Slo::default(), one_at_a_time());
    let jobs = (0..7).map(|n| job([n], 1)).collect();
    let events = handle.submit_all(jobs).unwrap();
    drop(gate);
    let ends: Vec<_> = events.into_iter().map(|e| listen(e).failed.map(|f| f.kind)).collect();
    let internal = Some(Kind::Internal);
    let expected =
        [internal, internal, None, internal, internal, internal, Some(Kind::Unavailable)];
    assert_eq!(ends, expected);
    thread.join().unwrap();
    assert_eq!(handle.state(), State::Failed);
    assert_eq!(kind(handle.submit(job([1], 1))), Some(Kind::Unavailable));
}

/// A runner whose answers do not fit what was asked.
struct Careless(fn(&mut StepOutput), FakeRunner);

impl Runner for Careless {
    fn capacity(&self) -> Capacity {
        self.1.capacity()
    }

    fn step(&mut self, input: &StepInput) -> Result<StepOutput, StepError> {
        let mut output = self.1.step(input)?;
        (self.0)(&mut output);
        Ok(output)
    }
}

#[test]
fn an_answer_that_does_not_fit_is_a_failed_step() {
    let faults: [fn(&mut StepOutput); 4] = [
        |output| output.sampled.clear(),
        |output| output.scored.clear(),
        |output| output.sampled[0].as_mut().unwrap().token = 256,
        |output| output.scored[0].as_mut().unwrap().top[0].0 = 256,
    ];
    for fault in faults {
        let careless = move || Careless(fault, FakeRunner::small());
        let (handle, _thread) = ready(careless, Slo::default(), Settings::default());
        let scoring = Job { score_prompt: Some(1), ..job([1, 2], 1) };
        let heard = listen(handle.submit(scoring).unwrap());
        assert_eq!(heard.failed.map(|error| error.kind), Some(Kind::Internal));
        assert_eq!(handle.state(), State::Ready);
    }
}

#[test]
fn the_heartbeat_ages_only_while_there_is_work() {
    let (handle, thread, gate) = gated(Slo::default(), Settings::default());
    assert_eq!(handle.heartbeat_age(), Duration::ZERO);
    let events = handle.submit(job([1], 1)).unwrap();
    gate.arrival().unwrap();
    let age = handle.heartbeat_age();
    assert!(age > Duration::ZERO && handle.heartbeat_age() > age);
    drop(gate);
    listen(events);
    handle.drain();
    thread.join().unwrap();
    assert_eq!(handle.heartbeat_age(), Duration::ZERO);
}
