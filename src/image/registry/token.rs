//! Tokens of a registry's token service (distribution specification, token authentication; RFC 6749 for identity tokens).

use super::{
    address::Address,
    auth_file::Secret,
    credentials::{Credentials, basic},
    failure::{Failure, denied, login_name, refused, status_line, unreachable},
    http::{Http, Paced, Request},
    status::Status,
};
use crate::{
    error::{Code, Error},
    formats::go_json,
    image::RegistryName,
};
use serde::Deserialize;
use std::{io::Read, time::Duration};
use ureq::http::StatusCode;

/// The longest response of a token service, in bytes. Tokens with many rights have a few kB.
const MAX_ANSWER: u64 = 1 << 20;
/// The longest time for a whole response.
const SECONDS: u64 = 60;

/// A challenge of the registry itself.
pub struct Demand<'a> {
    /// The address that sent it.
    pub registry: &'a Address,
    /// The address of the token service.
    pub realm: &'a str,
    /// The name of the registry there.
    pub service: Option<&'a str>,
    /// The rights that the token is to carry.
    pub scope: &'a str,
}

/// Fetches a token with the credentials of the registry that demands it. Returns the value for Authorization.
pub fn fetch(
    http: &Http,
    demand: &Demand<'_>,
    credentials: &Credentials,
    name: &RegistryName,
    status: &Status,
) -> Result<String, Failure> {
    let service = token_service(http, demand)?;
    let _waiting = status.waiting(format!("the token service {}", service.public()));
    let named = demand.service.map(|service| ("service", service));
    let (address, form, authorization);
    let request = match &credentials.secret {
        Some(Secret::IdentityToken(token)) => {
            let fields = [
                ("grant_type", "refresh_token"),
                ("refresh_token", token.as_str()),
                ("scope", demand.scope),
                ("client_id", "gpurun"),
            ];
            form = fields.into_iter().chain(named).collect::<Vec<_>>();
            request(&service, Some(&form), None)
        }
        Some(Secret::Password { user, password }) => {
            address = service.with_query(named.into_iter().chain([("scope", demand.scope)]));
            authorization = basic(user, password);
            request(&address, None, Some(&authorization))
        }
        None => {
            address = service.with_query(named.into_iter().chain([("scope", demand.scope)]));
            request(&address, None, None)
        }
    };
    let answer = http.send(&request, status)?;
    let host = answer.from.origin().host();
    let code = answer.response.status();
    if !code.is_success() {
        let who = login_name(demand.registry);
        let asked = format!("the token service {}", service.public());
        return Err(match code {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST => {
                let cause = status_line(answer.response);
                denied(&host, name, &who, format!("{cause}: {asked}")).cause(&credentials.found)
            }
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::GONE => {
                let what = format!("{who} wants a token for {name}, and its token service has none");
                let cause = format!("{asked}: {}", status_line(answer.response));
                Failure::lasting(Error::new(Code::NotAuthorised, what).cause(cause).fix(match &credentials.secret {
                    Some(Secret::IdentityToken(_)) => format!(
                        "log in with a password or an access token instead of an identity token: docker logout {who}; docker login -u NAME {who}"
                    ),
                    _ => format!("check the registry's name ({who}); its administrator configures the token service (`auth: token: realm`)"),
                }))
            }
            _ => refused(answer.response, &answer.from, "", name).cause(asked),
        });
    }
    let mut bytes = Vec::new();
    let mut body =
        Paced::new(answer.response.into_body().into_reader()).for_seconds(SECONDS).take(MAX_ANSWER);
    let passing = |cause: String| {
        Failure::passing(
            unreachable(format!("the token service of {} gave no token", demand.registry.origin().host()))
                .cause(format!("{}: {cause}", service.public())),
        )
    };
    body.read_to_end(&mut bytes).map_err(|error| passing(error.to_string()))?;
    read_token(&bytes).map(|token| format!("Bearer {token}")).map_err(passing)
}

fn request<'a>(
    address: &'a Address,
    form: Option<&'a [(&'a str, &'a str)]>,
    authorization: Option<&'a str>,
) -> Request<'a> {
    Request {
        address,
        authorization,
        accept: "application/json, */*",
        range: None,
        form,
        verified: false,
        time: Duration::from_secs(SECONDS),
    }
}

/// The address of the token service, if a secret may be sent there.
fn token_service(http: &Http, demand: &Demand<'_>) -> Result<Address, Failure> {
    let registry = demand.registry.origin();
    let parsed = Address::parse(demand.realm).and_then(|service| {
        http.trust().may_lead(registry, service.origin(), false)?;
        Ok(service)
    });
    parsed.map_err(|why| {
        let shown: String = demand.realm.chars().take(200).collect();
        let what = format!("{} names a token service that is not asked: {shown:?}", registry.host());
        Failure::lasting(Error::new(Code::NotAuthorised, what).cause(format!("the address {why}")).fix(
            "check the registry's name; its administrator gives the token service an https address (`auth: token: realm`)",
        ))
    })
}

/// The token in the response of a token service: `token`, else `access_token`.
fn read_token(bytes: &[u8]) -> Result<String, String> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Token {
        token: String,
        access_token: String,
    }
    let Token { token, access_token } =
        go_json::from_slice(bytes).map_err(|error| format!("its answer cannot be understood: {error}"))?;
    let found = [token, access_token].into_iter().find(|token| !token.is_empty());
    let found = found.ok_or("its answer has neither token nor access_token")?;
    // The token becomes part of a header.
    if !found.bytes().all(|byte| (b'!'..=b'~').contains(&byte)) {
        return Err("its token has characters that no header may have".into());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_found_under_both_names() {
        for (answer, expected) in [
            (r#"{"token": "T"}"#, Some("T")),
            (r#"{"access_token": "A"}"#, Some("A")),
            (r#"{"token": "T", "access_token": "A"}"#, Some("T")),
            (r#"{"token": "", "access_token": "A"}"#, Some("A")),
            (r#"{"token": null, "access_token": "A", "expires_in": "x"}"#, Some("A")),
            (r#"{"Token": "T"}"#, Some("T")),
            (r#"{"token": "", "access_token": ""}"#, None),
            (r#"{"token": "T\r\nX: y"}"#, None),
            (r#"{"token": "T U"}"#, None),
            (r#"{"token": "ä"}"#, None),
            (r#"{"token": 1}"#, None),
            ("{}", None),
            ("T", None),
            ("", None),
        ] {
            assert_eq!(read_token(answer.as_bytes()).ok().as_deref(), expected, "{answer}");
        }
    }
}
