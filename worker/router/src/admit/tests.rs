//! Tables of bodies, and what must hold for every body.

use proptest::prelude::*;

use super::*;

fn refused(body: &str) -> (Option<String>, String) {
    let refusal = scan(body.as_bytes()).unwrap_err();
    assert_eq!(refusal.status, 400);
    (refusal.error.param, refusal.error.message)
}

#[test]
fn routing_keys_are_found_wherever_they_stand() {
    let body = r#"{"messages":[{"role":"user","content":"{\"model\":\"no\"} [[["}],"n":3,"x":{"stream":false},
        "stream":true,"stream_options":{"include_usage":true,"y":[1]},"model":"tiny","stop":null}"#;
    let found = scan(body.as_bytes()).unwrap();
    assert_eq!(found, Scan { model: "tiny".into(), stream: true, include_usage: true, choices: 3 });
    assert!(matches!(found.model, Cow::Borrowed(_)));
}

#[test]
fn what_is_absent_or_null_has_its_default() {
    let body = br#"{"model":"a\/b","stream":null,"n":null,"stream_options":null,"stop":null}"#;
    let plain = Scan { model: "a/b".into(), stream: false, include_usage: false, choices: 1 };
    assert_eq!(scan(body).unwrap(), plain);
}

#[test]
fn every_prompt_counts() {
    let table = [
        (r#""a""#, 3),
        (r#"["a"]"#, 3),
        (r#"["a","b"]"#, 6),
        ("[1,2,3,4]", 3),
        ("[[1,2],[3],[4]]", 9),
        (r#"["a",[1]]"#, 6),
        (r#"["a","b","c","d","e","f","g"]"#, 16),
        ("[]", 3),
        ("7", 3),
        ("null", 3),
    ];
    for (prompt, choices) in table {
        let body = format!(r#"{{"model":"m","n":3,"prompt":{prompt}}}"#);
        assert_eq!(scan(body.as_bytes()).unwrap().choices, choices, "{prompt}");
    }
    assert_eq!(scan(br#"{"model":"m","n":64}"#).unwrap().choices, 16);
}

#[test]
fn each_refusal_names_the_field_and_its_range() {
    let list = |n: usize| format!("[{}]", vec!["\"x\""; n].join(","));
    let table = [
        (r#"{}"#.to_owned(), "model", "model is missing; name one of /v1/models"),
        (r#"{"model":null}"#.into(), "model", "model is missing; name one of /v1/models"),
        (r#"{"model":""}"#.into(), "model", "model is an empty string; use a string that is not empty"),
        (r#"{"model":["m"]}"#.into(), "model", "model is a list; use a string that is not empty"),
        (r#"{"model":"m","n":0}"#.into(), "n", "n is 0; use a whole number from 1 to 64"),
        (r#"{"model":"m","n":65}"#.into(), "n", "n is 65; use a whole number from 1 to 64"),
        (r#"{"model":"m","n":-1}"#.into(), "n", "n is -1; use a whole number from 1 to 64"),
        (r#"{"model":"m","n":1.5}"#.into(), "n", "n is 1.5; use a whole number from 1 to 64"),
        (r#"{"model":"m","n":"2"}"#.into(), "n", "n is a string; use a whole number from 1 to 64"),
        (r#"{"model":"m","stream":"yes"}"#.into(), "stream", "stream is a string; use true or false"),
        (
            r#"{"model":"m","stream_options":{"include_usage":1}}"#.into(),
            "stream_options.include_usage",
            "stream_options.include_usage is 1; use true or false",
        ),
        (r#"{"model":"m","stop":7}"#.into(), "stop", "stop is 7; use a string or a list of strings"),
        (format!(r#"{{"model":"m","stop":{}}}"#, list(17)), "stop", "stop has 17 entries; use at most 16"),
        (r#"{"model":"m","messages":{}}"#.into(), "messages", "messages is an object; use a list"),
        (
            format!(r#"{{"model":"m","messages":{}}}"#, list(1025)),
            "messages",
            "messages has 1025 entries; use at most 1024",
        ),
    ];
    for (body, param, message) in table {
        assert_eq!(refused(&body), (Some(param.to_owned()), message.to_owned()), "{body:.80}");
    }
}

#[test]
fn what_is_not_json_is_refused_with_its_place() {
    let table = [
        ("", "EOF while parsing a value at line 1 column 0"),
        ("[]", "invalid type: sequence, expected an object at line 1 column 0"),
        ("{\"model\":\"m\"", "EOF while parsing an object at line 1 column 12"),
        ("{\"model\":\"m\"} x", "trailing characters at line 1 column 15"),
        ("{\"model\":\"m\",\"t\":NaN}", "expected value at line 1 column 18"),
        ("{\"model\":\"m\",\"model\":\"k\"}", "`model` comes twice at line 1 column 20"),
        ("{\"n\":1,\"\\u006e\":2}", "`n` comes twice at line 1 column 15"),
    ];
    for (body, place) in table {
        let (param, message) = refused(body);
        assert_eq!(param, None, "{body}");
        assert!(message.ends_with(place), "{body}: {message}");
    }
    let refusal = scan(b"{\"model\":\"\xff\"}").unwrap_err();
    assert_eq!(refusal.error.message, "The body is not UTF-8 at byte 10");
}

#[test]
fn only_nesting_outside_strings_counts_as_depth() {
    let nested = |depth: usize| format!(r#"{{"model":"m","x":{}{}}}"#, "[".repeat(depth - 1), "]".repeat(depth - 1));
    assert!(scan(nested(DEPTH).as_bytes()).is_ok());
    assert_eq!(refused(&nested(DEPTH + 1)).1, "The body is nested deeper than 64 at byte 80");
    assert_eq!(refused(&"[".repeat(100_000)).1, "The body is nested deeper than 64 at byte 64");
    let text = format!(r#"{{"model":"m","x":"\"{}\\"}}"#, "[".repeat(500));
    assert!(scan(text.as_bytes()).is_ok());
}

proptest! {
    #[test]
    fn no_body_panics(body in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = scan(&body);
    }

    #[test]
    fn no_cut_body_is_taken(cut in 1..60_usize) {
        let body = br#"{"model":"tiny","messages":[{"role":"user"}],"stream":true,"n":2}"#;
        prop_assert!(scan(&body[..body.len() - cut]).is_err());
    }

    #[test]
    fn any_model_name_is_found_as_it_was_written(name in "\\PC{1,40}") {
        let body = serde_json::to_vec(&serde_json::json!({"a": [name.clone()], "model": name.clone()})).unwrap();
        prop_assert_eq!(scan(&body).unwrap().model, name);
    }
}
