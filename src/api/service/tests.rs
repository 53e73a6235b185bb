//! What no wire needs to be there for: over a pretend model that counts.

use super::*;
use crate::engine::fake::FakeRunner;
use crate::engine::{Event, Settings, State, start};
use crate::request::{Finish, Input, Message};
use crate::text::fixture;

/// A service of the task `image` and the bundle `tiny`, both raw text, whose texts end with `ends`.
pub async fn service(ends: Vec<u32>) -> Service {
    let named = |name: &str| Task { name: name.into(), ..Task::parse("raw", "").unwrap() };
    let tasks = TaskTable::new(vec![named("image"), named("tiny")]);
    let metrics = Arc::new(Metrics::new(&tasks.names()));
    let capacity = Capacity { blocks: 64, block_size: 16, context: 64, vocab: 512 };
    let count = |tokens: &[u32]| tokens[tokens.len() - 1] + 1;
    let build = move || Ok(FakeRunner::new(capacity).with_model(count));
    let (engine, _) = start(build, &tasks, Settings::default(), metrics.clone());
    engine.watch().wait_for(|state| *state == State::Ready).await.unwrap();
    let tokenizer = Arc::new(Tokenizer::from_json(fixture::GPT2_TINY).unwrap());
    let prompts = Prompts::new(&tasks, tokenizer).unwrap();
    Service::new(tasks, prompts, None, ends, engine, metrics)
}

fn request(model: &str, input: Input) -> Request {
    Request {
        record: Record::new("r"),
        model: model.into(),
        adapters: None,
        task: None,
        debug: false,
        prompt_field: if matches!(input, Input::Chat(_)) { "messages" } else { "prompt" },
        inputs: vec![input],
        controls: Default::default(),
        labels: Vec::new(),
        grammar: None,
        params: Params { temperature: Some(0.0), ..Params::default() },
        usual_max_tokens: Some(8),
        deadline: None,
        first_token_deadline: None,
    }
}

#[tokio::test]
async fn a_text_ends_with_any_of_its_ends() {
    let service = service(vec![20, 7]).await;
    for (first, tokens, finish, stop) in [
        (5, 1, Finish::EndToken, Some(7)),
        (17, 2, Finish::EndToken, Some(20)),
        (30, 8, Finish::Length, None),
    ] {
        for logprobs in [None, Some(1)] {
            let mut request = request("tiny", Input::Tokens(vec![first]));
            request.params.logprobs = logprobs;
            let reply = service.submit(request).await.unwrap().collect().await.unwrap();
            let end = reply.choices[0].end.as_ref().unwrap();
            let token = end.stop_token.as_ref();
            assert_eq!((end.finish, token.map(|token| token.id)), (finish, stop), "{first}");
            let scored = stop.and(logprobs).is_some();
            assert_eq!(token.is_some_and(|token| token.logprob.is_some()), scored, "{first}");
        }
        let ticket = service.submit(request("tiny", Input::Tokens(vec![first]))).await.unwrap();
        let reply = ticket.collect().await.unwrap();
        assert_eq!(reply.usage.completion_tokens, tokens, "{first}");
    }
    let mut endless = request("tiny", Input::Tokens(vec![5]));
    endless.params.ignore_eos = Some(true);
    let reply = service.submit(endless).await.unwrap().collect().await.unwrap();
    assert_eq!(reply.choices[0].end.as_ref().unwrap().finish, Finish::Length);
}

#[tokio::test]
async fn what_is_wrong_with_a_conversation_is_said_of_messages() {
    let service = service(vec![0]).await;
    let said = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
    let submit = async |model: &str, messages: &[Message]| {
        service.submit(request(model, Input::Chat(messages.to_vec()))).await.map(|_| ())
    };
    submit("image", &[said("user", "Hello")]).await.unwrap();
    for (model, messages, param, code) in [
        ("tiny", vec![said("user", "Hello")], "model", Some("no_chat_template")),
        ("image", vec![said("system", "Hello")], "messages", None),
        ("image", vec![said("user", &"long ".repeat(60))], "messages", None),
        ("image", vec![said("user", &"long ".repeat(60_000))], "messages", None),
        ("image", vec![], "messages", None),
    ] {
        let error = submit(model, &messages).await.unwrap_err();
        assert_eq!((error.param.as_deref(), error.code), (Some(param), code), "{error}");
    }
}

#[tokio::test]
async fn a_grammar_that_fails_on_the_way_is_called_as_the_client_calls_it() {
    let metrics = Arc::new(Metrics::new(&[]));
    let (record, tokenizer) = (Record::new("r"), Tokenizer::from_json(fixture::GPT2_TINY).unwrap());
    let meter = RequestMeter::new(metrics, record.clone());
    let (events, heard) = tokio::sync::mpsc::channel(1);
    let terms = Terms {
        record,
        model: "tiny".into(),
        tokenizer: Arc::new(tokenizer),
        stop: Vec::new(),
        logprobs: false,
        grammar: Some("regex"),
        debug: None,
        prompt_tokens: 1,
        seed: 0,
        deadline: None,
        first_token_deadline: None,
        in_flight: InFlight::new(&watch::Sender::new(0), 1).unwrap(),
    };
    let source = Source { events: heard, max_new: 1, echo: None };
    events.send(Event::Failed(Error::invalid("grammar", "too large"))).await.unwrap();
    let error = Ticket::new(terms, vec![source], meter).collect().await.unwrap_err();
    assert_eq!(error.param.as_deref(), Some("regex"));
}

#[tokio::test]
async fn labels_and_their_prompt_have_a_length() {
    let service = service(vec![0]).await;
    let score = async |service: &Service, label: &str| {
        let request = request("tiny", Input::Tokens(vec![1, 2]));
        service.submit(Request { labels: vec![label.into()], ..request }).await.map(|_| ())
    };
    let long = "one two three four five six";
    score(&service, long).await.unwrap();
    let capped = service.with_caps(Caps { input_tokens: Some(4), ..Caps::default() });
    score(&capped, "a").await.unwrap();
    let error = score(&capped, long).await.unwrap_err();
    assert_eq!((error.kind, error.param.as_deref()), (Kind::ContextLength, Some("labels")));
}
