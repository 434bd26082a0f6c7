import ApertusCore
import MLX

/// Runs `body`, in which an error of MLX does not end the process but is thrown.
///
/// - Parameters:
///   - doing: what `body` does, for the error.
///   - kind: the kind of the error, unless memory is short.
/// - Throws: `ApertusError`; what `body` itself throws, as it is.
func catchingMLX<R>(
    _ doing: @autoclosure () -> String, kind: ApertusError.Kind = .bug, _ body: () throws -> R
) throws -> R {
    do {
        return try withError(body)
    } catch let MLXError.caught(message) {
        let line = message.split(whereSeparator: \.isNewline).joined(separator: " ")
        let isMemory = line.contains("allocate") || line.contains("memory")
        throw ApertusError(isMemory ? .resource : kind, "\(doing()): \(line.prefix(300))")
    }
}
