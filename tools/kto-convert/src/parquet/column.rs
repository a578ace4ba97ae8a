//! JSON values as arrays of a type.

use super::{fields, kind::Kind};
use arrow_array::{
    ArrayRef, BooleanArray, Float64Array, Int64Array, ListArray, RecordBatch, StringArray, StructArray,
};
use arrow_buffer::{NullBuffer, OffsetBuffer};
use arrow_schema::{DataType, Field, Fields, Schema};
use kto_cli::{Error, Result};
use serde_json::Value;
use std::sync::Arc;

/// Rows as a batch. `kind` is the type of a row; without rows there is no column.
pub fn batch(kind: &Kind, rows: &[Value]) -> Result<RecordBatch> {
    let known: &[(String, Kind)] = match kind {
        Kind::Struct(known) => known,
        _ => &[],
    };
    let mut columns = Vec::new();
    for (name, kind) in known {
        let values: Vec<Option<&Value>> = rows.iter().map(|row| fields(row)?.get(name)).collect();
        columns.push(array(kind, &values)?);
    }
    let schema = Arc::new(Schema::new(schema(known)));
    let options = arrow_array::RecordBatchOptions::new().with_row_count(Some(rows.len()));
    RecordBatch::try_new_with_options(schema, columns, &options).map_err(|e| Error::internal(e.to_string()))
}

fn schema(known: &[(String, Kind)]) -> Fields {
    known.iter().map(|(name, kind)| Field::new(name, data_type(kind), true)).collect()
}

fn data_type(kind: &Kind) -> DataType {
    match kind {
        Kind::Bool => DataType::Boolean,
        Kind::Int => DataType::Int64,
        Kind::Float => DataType::Float64,
        Kind::Null | Kind::Text | Kind::Json => DataType::Utf8,
        Kind::List(item) => DataType::List(Arc::new(Field::new("item", data_type(item), true))),
        Kind::Struct(known) => DataType::Struct(schema(known)),
    }
}

fn array(kind: &Kind, values: &[Option<&Value>]) -> Result<ArrayRef> {
    let there = |v: &Option<&Value>| v.is_some_and(|v| !v.is_null());
    Ok(match kind {
        Kind::Bool => Arc::new(BooleanArray::from_iter(values.iter().map(|v| v.and_then(Value::as_bool)))),
        Kind::Int => Arc::new(Int64Array::from_iter(values.iter().map(|v| v.and_then(Value::as_i64)))),
        Kind::Float => Arc::new(Float64Array::from_iter(values.iter().map(|v| v.and_then(Value::as_f64)))),
        Kind::Null | Kind::Text => {
            Arc::new(StringArray::from_iter(values.iter().map(|v| v.and_then(Value::as_str))))
        }
        Kind::Json => {
            let text = values.iter().map(|v| v.filter(|v| !v.is_null()).map(Value::to_string));
            Arc::new(StringArray::from_iter(text))
        }
        Kind::List(item) => {
            let lists = values.iter().map(|v| v.and_then(Value::as_array));
            let lengths = lists.clone().map(|list| list.map_or(0, Vec::len));
            let items: Vec<Option<&Value>> = lists.flatten().flatten().map(Some).collect();
            let field = Arc::new(Field::new("item", data_type(item), true));
            let nulls = NullBuffer::from_iter(values.iter().map(there));
            let list = ListArray::try_new(
                field,
                OffsetBuffer::from_lengths(lengths),
                array(item, &items)?,
                Some(nulls),
            );
            Arc::new(list.map_err(|e| Error::internal(e.to_string()))?)
        }
        Kind::Struct(known) => {
            let mut columns = Vec::new();
            for (name, kind) in known {
                let inner: Vec<Option<&Value>> = values.iter().map(|v| v.and_then(|v| v.get(name))).collect();
                columns.push(array(kind, &inner)?);
            }
            let nulls = NullBuffer::from_iter(values.iter().map(there));
            let built = StructArray::try_new(schema(known), columns, Some(nulls));
            Arc::new(built.map_err(|e| Error::internal(e.to_string()))?)
        }
    })
}
