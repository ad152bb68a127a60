//! Parses one record of comma-separated values, the format of Docker's `--gpus` and `--mount` (Go's encoding/csv).

/// The fields of the only record of a CSV text (RFC 4180): a field in double quotes may hold commas, and `""` in it
/// is one quote.
///
/// # Errors
/// The reason why it is not a record.
pub fn record(text: &str) -> Result<Vec<String>, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    let (mut fields, mut field) = (Vec::new(), String::new());
    let mut rest = text.chars().peekable();
    loop {
        if rest.next_if_eq(&'"').is_some() {
            loop {
                match rest.next() {
                    Some('"') if rest.next_if_eq(&'"').is_some() => field.push('"'),
                    Some('"') => break,
                    Some(other) => field.push(other),
                    None => return Err("a quote is not closed"),
                }
            }
        } else {
            while let Some(other) = rest.next_if(|&next| next != ',') {
                if other == '"' {
                    return Err("a quote stands inside a field and not around it");
                }
                field.push(other);
            }
        }
        fields.push(std::mem::take(&mut field));
        match rest.next() {
            None => return Ok(fields),
            Some(',') => {}
            Some(_) => return Err("a quote is followed by something else than a comma"),
        }
    }
}
