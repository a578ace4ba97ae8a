//! One cell of a column file as a JSON value.

use crate::{json::quoted, rows::Row};
use arrow_array::{
    Array, ArrayRef, RecordBatch,
    cast::AsArray,
    types::{
        ArrowDictionaryKeyType, Date32Type, Date64Type, Decimal128Type, DurationMicrosecondType, Float16Type,
        Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, TimestampMicrosecondType,
        TimestampMillisecondType, TimestampNanosecondType, TimestampSecondType, UInt8Type, UInt16Type,
        UInt32Type, UInt64Type,
    },
};
use arrow_schema::{DataType, TimeUnit};
use kto_cli::{Error, Result, guard};
use serde_json::{Map, Number, Value};

/// Nesting of types, at most.
const DEPTH: u32 = 64;

/// True when [`value`] can read a column of this type.
pub(super) fn is_read(kind: &DataType) -> bool {
    is_read_at(kind, 0)
}

fn is_read_at(kind: &DataType, depth: u32) -> bool {
    use DataType as T;
    match kind {
        T::Null | T::Boolean | T::Utf8 | T::LargeUtf8 | T::Utf8View => true,
        T::Binary | T::LargeBinary | T::BinaryView => true,
        T::Int8 | T::Int16 | T::Int32 | T::Int64 | T::UInt8 | T::UInt16 | T::UInt32 | T::UInt64 => true,
        T::Float16 | T::Float32 | T::Float64 | T::Decimal128(..) => true,
        T::Date32 | T::Date64 | T::Timestamp(..) | T::Duration(TimeUnit::Microsecond) => true,
        T::List(f) | T::LargeList(f) | T::FixedSizeList(f, _) | T::Map(f, _) => {
            depth < DEPTH && is_read_at(f.data_type(), depth + 1)
        }
        T::Struct(fields) => depth < DEPTH && fields.iter().all(|f| is_read_at(f.data_type(), depth + 1)),
        T::Dictionary(key, item) => key.is_integer() && is_read_at(item, depth + 1),
        _ => false,
    }
}

/// Gives the rows of a batch to `each`. The number of the first one is `first`.
pub(crate) fn rows(
    name: &str,
    batch: &RecordBatch,
    first: u64,
    mut each: impl FnMut(Row) -> Result<()>,
) -> Result<()> {
    let schema = batch.schema();
    (0..batch.num_rows()).try_for_each(|i| {
        let line = first + i as u64;
        let row = || -> Result<Value, Fault> {
            let cell = |(field, column): (&arrow_schema::FieldRef, &ArrayRef)| {
                let value =
                    value(column, i).map_err(|f| Fault { column: Some(field.name().clone()), ..f })?;
                Ok((field.name().clone(), value))
            };
            let fields = schema.fields().iter().zip(batch.columns()).map(cell);
            fields.collect::<Result<Map<_, _>, _>>().map(Value::Object)
        };
        // A damaged offset makes arrow panic.
        let value = guard::catch(format_args!("{name}:{line}"), row)?.map_err(|fault| {
            let column = quoted(fault.column.as_deref().unwrap_or_default());
            Error::data(format!("{name}:{line}: field {column}: {}", fault.what))
        });
        each(Row { line, value, ..Row::none() })
    })
}

/// Why a cell cannot be read.
struct Fault {
    column: Option<String>,
    what: String,
}

fn fault(what: impl Into<String>) -> Fault {
    Fault { column: None, what: what.into() }
}

fn value(array: &dyn Array, i: usize) -> Result<Value, Fault> {
    use DataType as T;
    if array.is_null(i) {
        return Ok(Value::Null);
    }
    macro_rules! number {
        ($($kind:ident)*) => {
            match array.data_type() {
                $(T::$kind => return Ok(Value::Number(array.as_primitive::<paste_type!($kind)>().value(i).into())),)*
                _ => {}
            }
        };
    }
    macro_rules! paste_type {
        (Int8) => {
            Int8Type
        };
        (Int16) => {
            Int16Type
        };
        (Int32) => {
            Int32Type
        };
        (Int64) => {
            Int64Type
        };
        (UInt8) => {
            UInt8Type
        };
        (UInt16) => {
            UInt16Type
        };
        (UInt32) => {
            UInt32Type
        };
        (UInt64) => {
            UInt64Type
        };
    }
    number!(Int8 Int16 Int32 Int64 UInt8 UInt16 UInt32 UInt64);
    match array.data_type() {
        T::Null => Ok(Value::Null),
        T::Boolean => Ok(Value::Bool(array.as_boolean().value(i))),
        T::Utf8 => Ok(array.as_string::<i32>().value(i).into()),
        T::LargeUtf8 => Ok(array.as_string::<i64>().value(i).into()),
        T::Utf8View => Ok(array.as_string_view().value(i).into()),
        T::Binary => text(array.as_binary::<i32>().value(i)),
        T::LargeBinary => text(array.as_binary::<i64>().value(i)),
        T::BinaryView => text(array.as_binary_view().value(i)),
        // The shortest decimal that is this float, not the digits of its double.
        T::Float16 => Ok(float(array.as_primitive::<Float16Type>().value(i).to_string().parse().ok())),
        T::Float32 => Ok(float(array.as_primitive::<Float32Type>().value(i).to_string().parse().ok())),
        T::Float64 => Ok(float(Some(array.as_primitive::<Float64Type>().value(i)))),
        T::Decimal128(..) => Ok(array.as_primitive::<Decimal128Type>().value_as_string(i).into()),
        T::Date32 => Ok(array.as_primitive::<Date32Type>().value(i).into()),
        T::Date64 => Ok(array.as_primitive::<Date64Type>().value(i).into()),
        T::Timestamp(TimeUnit::Second, _) => Ok(array.as_primitive::<TimestampSecondType>().value(i).into()),
        T::Timestamp(TimeUnit::Millisecond, _) => {
            Ok(array.as_primitive::<TimestampMillisecondType>().value(i).into())
        }
        T::Timestamp(TimeUnit::Microsecond, _) => {
            Ok(array.as_primitive::<TimestampMicrosecondType>().value(i).into())
        }
        T::Timestamp(TimeUnit::Nanosecond, _) => {
            Ok(array.as_primitive::<TimestampNanosecondType>().value(i).into())
        }
        T::Duration(_) => Ok(array.as_primitive::<DurationMicrosecondType>().value(i).into()),
        T::List(_) => list(&array.as_list::<i32>().value(i)),
        T::LargeList(_) => list(&array.as_list::<i64>().value(i)),
        T::FixedSizeList(..) => list(&array.as_fixed_size_list().value(i)),
        T::Struct(fields) => {
            let columns = array.as_struct().columns();
            object(fields.iter().map(|f| f.name().clone()).zip(columns), i)
        }
        T::Map(..) => map(&array.as_map().value(i)),
        T::Dictionary(key, _) => match **key {
            T::Int8 => entry::<Int8Type>(array, i),
            T::Int16 => entry::<Int16Type>(array, i),
            T::Int32 => entry::<Int32Type>(array, i),
            T::Int64 => entry::<Int64Type>(array, i),
            T::UInt8 => entry::<UInt8Type>(array, i),
            T::UInt16 => entry::<UInt16Type>(array, i),
            T::UInt32 => entry::<UInt32Type>(array, i),
            _ => entry::<UInt64Type>(array, i),
        },
        other => Err(fault(format!("type {other} is not read"))),
    }
}

fn text(bytes: &[u8]) -> Result<Value, Fault> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.into()),
        Err(_) => Err(fault(format!("{} bytes that are no text; only text can be trained on", bytes.len()))),
    }
}

fn float(value: Option<f64>) -> Value {
    value.and_then(Number::from_f64).map_or(Value::Null, Value::Number)
}

fn list(items: &ArrayRef) -> Result<Value, Fault> {
    (0..items.len()).map(|i| value(items, i)).collect::<Result<Vec<_>, _>>().map(Value::Array)
}

fn object<'a>(fields: impl Iterator<Item = (String, &'a ArrayRef)>, i: usize) -> Result<Value, Fault> {
    let mut map = Map::new();
    for (name, column) in fields {
        if !column.is_null(i) {
            map.insert(name, value(column, i)?);
        }
    }
    Ok(Value::Object(map))
}

fn map(entries: &dyn Array) -> Result<Value, Fault> {
    let entries = entries.as_struct();
    let (keys, values) = (entries.column(0), entries.column(1));
    let mut map = Map::new();
    for i in 0..entries.len() {
        match value(keys, i)? {
            Value::String(key) => map.insert(key, value(values, i)?),
            other => map.insert(other.to_string(), value(values, i)?),
        };
    }
    Ok(Value::Object(map))
}

fn entry<K: ArrowDictionaryKeyType>(array: &dyn Array, i: usize) -> Result<Value, Fault> {
    let dictionary = array.as_dictionary::<K>();
    match dictionary.key(i) {
        Some(key) if key < dictionary.values().len() => value(dictionary.values(), key),
        _ => Err(fault("a dictionary entry that does not exist")),
    }
}
